"""examples/quickstart.ipynb: its stored outputs are whole, and it runs from top to bottom in a real kernel."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.launching import ROOT
from tests.support.tiny import base_model, sentence, tokenizer

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
SAID = (
    "100 sentences to train on, 100 held out",
    "StructLoRA on torch, 1 process",
    "Wrote a plain LoRA adapter to small",
)


def _outputs(notebook) -> list:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def _text(notebook) -> str:
    return "".join(output.get("text", "") for output in _outputs(notebook))


def test_stored_outputs_are_whole():
    """The site shows them. They are of one run, without errors, and tell nothing of the machine."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    run = [
        c
        for c in notebook.cells
        if c.cell_type == "code" and "skip-execution" not in c.metadata.get("tags", [])
    ]
    assert [cell.execution_count for cell in run] == [*range(1, len(run) + 1)]
    assert not [output for output in _outputs(notebook) if output.output_type == "error"]
    assert all(part in _text(notebook) for part in SAID)
    (comment,) = (cell.source for cell in notebook.cells if cell.source.startswith("## Compare"))
    figures = re.findall(r"0\.\d+", comment)  # held-out losses, which are those of the run that is stored
    assert figures and all(f"'eval_loss': '{figure}'" in _text(notebook) for figure in figures)
    written = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work|usr)/", written) and len(written) < 300_000


def test_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """With a tiny model and sentences where the demo's downloads would be."""
    pytest.importorskip("ipykernel")
    cache = tmp_path / "cache" / "structlora-trl"
    base_model("llama").save_pretrained(cache / "SmolLM2-135M-Instruct")
    tokenizer().save_pretrained(cache / "SmolLM2-135M-Instruct")
    (cache / "rated-sentences").mkdir()
    rated = "".join(f"{i}\t{(-2, 2)[i % 2]}\t{sentence(i)} {i}\n" for i in range(220))
    (cache / "rated-sentences" / "movieReviewSnippets_GroundTruth.txt").write_text(rated)
    (tmp_path / "demo").symlink_to(ROOT / "examples" / "demo")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    assert all(part in _text(notebook) for part in SAID)
    assert sum("image/png" in output.get("data", {}) for output in _outputs(notebook)) == 1
    for folder in ("structlora", "small"):
        assert (tmp_path / folder / "adapter_model.safetensors").is_file()
