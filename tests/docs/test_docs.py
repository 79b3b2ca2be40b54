"""What the pages under docs/ take from the code is what the code says."""

from __future__ import annotations

import ast
import json
import re
import runpy
from dataclasses import fields

import pytest
from peft import LoraConfig

from structlora_trl import StructLoRAConfig
from structlora_trl.core.selection import LEAST_STEPS
from tests.support.launching import ROOT
from tests.support.tiny import attached, peft_model, train

DOCS = ROOT / "docs"
REFUSALS = runpy.run_path(str(DOCS / "refusals.py"))


@pytest.mark.parametrize(
    "file, script, make",
    [
        ("when-refused.md", "refusals", "page"),
        ("what-runs.md", "what_runs", "page"),
        ("map.svg", "draw_map", "picture"),
        ("imports.svg", "draw_imports", "picture"),
    ],
)
def test_generated_files_are_current(file, script, make):
    made = runpy.run_path(str(DOCS / f"{script}.py"))[make]()
    assert made == (DOCS / file).read_text(encoding="utf-8"), f"run `python docs/{script}.py`"


def test_the_picture_can_be_read_on_a_telephone():
    """A page of 390 pixels leaves about 350 to a picture."""
    drawn = (DOCS / "map.svg").read_text(encoding="utf-8")
    width = float(re.search(r'viewBox="0 0 (\d+)', drawn)[1])
    smallest = min(map(float, re.findall(r'font-size="([\d.]+)"', drawn)))
    assert smallest * 350 / width > 10  # pixels


def test_every_metric_is_explained():
    model, optimizer, runtime = attached(
        peft_model(targets=["q_proj", "o_proj"]), keep=0.5, select_at=LEAST_STEPS
    )
    train(model, "llama", optimizer, LEAST_STEPS + 1)
    rows = re.search(
        r"\| metric \|.*?(?=\n\n)", (DOCS / "how-it-works.md").read_text(encoding="utf-8"), re.DOTALL
    )[0]
    named = {name for row in rows.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == {name.removeprefix("structlora/") for name in runtime.metrics()}


def test_every_option_is_explained():
    page = (DOCS / "options.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| option \|.*?(?=\n\n)", page, re.DOTALL | re.MULTILINE)
    rows = [row.strip("| ").split(" | ") for table in tables for row in table.splitlines()[2:]]
    named = {name: default for row in rows for name, default in re.findall(r"^`(\w+)` \(`?(.*?)`?\)", row[0])}
    assert all(all(row) for row in rows)
    written = {name: ast.literal_eval(default) for name, default in named.items()}
    assert written == {option.name: option.default for option in fields(StructLoRAConfig)}


def test_every_remedy_is_more_than_a_placeholder():
    vague = [row for row in REFUSALS["refusals"]() if re.fullmatch(r"\s*<[^>]*>\s*", row.remedy)]
    assert not vague, "write the remedy where the error is raised, or in a name that its function assigns"


def test_links_lead_somewhere():
    folders = (ROOT, DOCS, ROOT / "examples", ROOT / "upstream", *(ROOT / "integrations").glob("*/"))
    for page in (page for folder in folders for page in folder.glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_experiment_offered_to_peft_loads():
    (folder,) = (path.parent for path in (ROOT / "upstream").rglob("structlora.json"))
    assert LoraConfig(**json.loads((folder / "adapter_config.json").read_text())).r == 32
    StructLoRAConfig.build(json.loads((folder / "structlora.json").read_text()))
