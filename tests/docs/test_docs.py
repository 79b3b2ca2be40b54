"""What the pages under docs/ take from the code is what the code says."""

from __future__ import annotations

import ast
import re
import runpy
from dataclasses import fields
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.method_comparison.run import PINNED
from structlora_trl import StructLoRAConfig, StructLoRAError, attach
from tests.support.tiny import adamw, peft_model, train

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
REFUSALS = runpy.run_path(str(DOCS / "refusals.py"))


@pytest.mark.parametrize(
    "file, script, make",
    [
        ("when-refused.md", "refusals", "page"),
        ("map.svg", "draw_map", "picture"),
        ("../README.md", "front_doors", "page"),
    ],
)
def test_generated_files_are_current(file, script, make):
    made = runpy.run_path(str(DOCS / f"{script}.py"))[make]()
    assert made == (DOCS / file).read_text(encoding="utf-8"), f"run `python docs/{script}.py`"


def test_picture_is_well_formed():
    assert ElementTree.parse(DOCS / "map.svg").getroot().tag.endswith("svg")


def test_every_metric_is_explained():
    model = peft_model(targets=["q_proj", "o_proj"])
    optimizer = adamw(model)
    runtime = attach(model, optimizer, head_gates=True)
    train(model, "llama", optimizer, 2)
    rows = re.search(r"\| metric \|.*?(?=\n\n)", (DOCS / "how-it-works.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    named = {name for row in rows.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == {name.removeprefix("structlora/") for name in runtime.metrics()}


def test_every_option_is_explained():
    page = (DOCS / "options.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| option \|.*?(?=\n\n)", page, re.DOTALL | re.MULTILINE)
    rows = [row.strip("| ").split(" | ") for table in tables for row in table.splitlines()[2:]]
    named = {name: default for row in rows for name, default in re.findall(r"^`(\w+)` \(`?(.*?)`?\)", row[0])}
    assert all(len(row) == 3 and all(row) for row in rows)
    written = {name: ast.literal_eval(default) for name, default in named.items()}
    assert written == {option.name: option.default for option in fields(StructLoRAConfig)}


def test_the_pinned_commit_of_peft_is_on_the_page():
    assert f"`{PINNED}`" in (DOCS / "benchmarks.md").read_text(encoding="utf-8")


def test_every_remedy_is_more_than_a_placeholder():
    vague = [row for row in REFUSALS["refusals"]() if re.fullmatch(r"\s*<[^>]*>\s*", row.remedy)]
    assert not vague, "write the remedy where the error is raised, or in a name that its function assigns"


def pattern(row) -> str:
    """A regular expression for the messages of a row."""
    parts = []
    for part in row[1:]:
        either = "|".join(re.sub(r"\\\[(.*?)\\\]", r"(\1)?", re.escape(text)) for text in part.split(" / "))
        parts.append("(" + re.sub("<[^>]+>", ".+", either) + ")")
    return "StructLoRA found {}\\. Expected {}\\. Fix: {}\\.".format(*parts)


@pytest.mark.parametrize(
    "raises",
    [
        lambda: StructLoRAConfig(prior=2),
        lambda: StructLoRAConfig(filter="ibb"),
        lambda: StructLoRAConfig(seed=-1),
        lambda: StructLoRAConfig.build(piror=0.3),
        lambda: StructLoRAConfig.build(nothing_like_it=0.3),
        lambda: attach(torch.nn.Linear(1, 1), None),
    ],
)
def test_real_messages_are_on_the_page(raises):
    with pytest.raises(StructLoRAError) as caught:
        raises()
    assert any(re.fullmatch(pattern(row), str(caught.value), re.DOTALL) for row in REFUSALS["refusals"]())


def test_links_lead_somewhere():
    for page in (page for folder in (ROOT, DOCS, ROOT / "examples") for page in folder.glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
