"""examples/quickstart.ipynb runs from top to bottom in a real kernel, with a tiny model under the public name."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from datasets import Dataset
from nbclient import NotebookClient

from tests.support.data import chats
from tests.support.launching import ROOT
from tests.support.tiny import base_model, tokenizer

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def test_committed_without_outputs():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_runs_from_top_to_bottom(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    model, data = tmp_path / "HuggingFaceTB" / "SmolLM2-360M-Instruct", tmp_path / "trl-lib" / "Capybara"
    base_model("llama").save_pretrained(model)
    tokenizer().save_pretrained(model)
    data.mkdir(parents=True)
    Dataset.from_list(chats(12)).to_parquet(data / "train.parquet")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = "".join(output.get("text", "") for output in outputs)
    assert "StructLoRA on torch, 1 process" in said
    gates = re.findall(r"^ *\d+ +(\d)/8 +(0\.\d+)", said, re.MULTILINE)  # layer, open of 8, openness
    assert len(gates) >= 7 and all(0 < float(openness) < 1 for _, openness in gates)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert (tmp_path / "structlora" / "adapter_model.safetensors").is_file()
