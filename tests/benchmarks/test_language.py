"""The language model's runs and the table of coherence over depth, on a tiny model in the place of SmolLM2."""

from __future__ import annotations

import dataclasses
import math
import sys

import pytest

from benchmarks.quality import assets, cell, coherence, language, tasks
from tests.support.data import save_base
from tests.support.tiny import LAYERS

pytestmark = pytest.mark.slow
EXAMPLES = [(f"w{i} w{i + 1}", f" w{i % 2}") for i in range(40)]


@pytest.fixture(autouse=True)
def tiny_model(tmp_path, monkeypatch):
    save_base(tmp_path)
    monkeypatch.setattr(assets, "smollm", lambda: tmp_path)
    for name, task in language.LANGUAGE_TASKS.items():
        small = dataclasses.replace(task, load=lambda: (EXAMPLES, EXAMPLES[:20], EXAMPLES[20:]), steps=3)
        monkeypatch.setitem(language.LANGUAGE_TASKS, name, small)


def test_the_table_has_a_row_for_each_kind(monkeypatch, capsys):
    monkeypatch.setattr(coherence, "FAR", LAYERS - 1)
    monkeypatch.setattr(sys, "argv", ["coherence", "--steps", "3", "--examples", "16", "--rank", "2"])
    coherence.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "_proj |" in line]
    assert [row[0].strip() for row in rows] == [*tasks.CHAT_LINEAR]
    assert all(0 <= float(cell) <= 1 for row in rows for cell in row[1:])


@pytest.mark.parametrize("task", language.LANGUAGE_TASKS)
@pytest.mark.parametrize("method", ["lora", "random-gates"])
def test_a_run_is_measured(task, method):
    line = cell.run(task, method, 4, 8, 1e-2, 0)
    assert line["steps"] == 3 and (line["structlora"] is None) == (method == "lora")
    for part in (line["validation"], line["test"]):
        assert math.isfinite(part["nll"]) and 0 <= part["accuracy"] <= 100
