"""What the pages under docs/ take from the code is what the code says."""

from __future__ import annotations

import ast
import json
import re
import runpy

import pytest
from peft import LoraConfig

from structlora_trl import StructLoRAConfig
from tests.support.launching import ROOT
from tests.support.tiny import attached, peft_model, train

DOCS = ROOT / "docs"


@pytest.mark.parametrize(
    "file, script, make",
    [
        ("options.md", "options", "page"),
        ("what-runs.md", "what_runs", "page"),
        ("map.svg", "draw_map", "picture"),
        ("imports.svg", "draw_imports", "picture"),
    ],
)
def test_generated_files_are_current(file, script, make):
    made = runpy.run_path(str(DOCS / f"{script}.py"))[make]()
    assert made == (DOCS / file).read_text(encoding="utf-8"), f"run `python docs/{script}.py`"


def test_every_metric_is_explained():
    model, optimizer, runtime = attached(peft_model(targets=["q_proj", "o_proj"]), keep=0.5, select_at=2)
    train(model, "llama", optimizer, 3)
    rows = re.search(
        r"\| metric \|.*?(?=\n\n)", (DOCS / "how-it-works.md").read_text(encoding="utf-8"), re.DOTALL
    )[0]
    named = {name for row in rows.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == {name.removeprefix("structlora/") for name in runtime.metrics()}


def test_errors_that_the_page_quotes_are_those_of_the_package():
    """A name of the user's own stands as `…`."""
    sources = [path for path in (ROOT / "structlora_trl").rglob("*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sources]
    texts = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    said = "\n".join(text for text in texts if isinstance(text, str))
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 20
    for row in rows:
        quoted = re.findall(r"(?<!`)(``?)(?!`)(.+?)\1", row)
        parts = [part.strip() for _, message in quoted for part in message.split("…") if part.strip()]
        assert all(part in said for part in parts), row


def test_links_lead_somewhere():
    folders = (ROOT, DOCS, ROOT / "examples", ROOT / "upstream", *(ROOT / "integrations").glob("*/"))
    for page in (page for folder in folders for page in folder.glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_experiment_offered_to_peft_loads():
    (folder,) = (path.parent for path in (ROOT / "upstream").rglob("structlora.json"))
    assert LoraConfig(**json.loads((folder / "adapter_config.json").read_text())).r == 32
    StructLoRAConfig.build(json.loads((folder / "structlora.json").read_text()))
