"""The language model's runs and the table of coherence over depth, on a tiny model in the place of SmolLM2."""

from __future__ import annotations

import dataclasses
import math
import sys

import pytest
import torch

from benchmarks.quality import assets, cell, coherence, language, tasks
from tests.support.data import save_base
from tests.support.tiny import LAYERS


def test_the_table_has_a_row_for_each_kind(tmp_path, monkeypatch, capsys):
    save_base(tmp_path)
    monkeypatch.setattr(assets, "smollm", lambda: tmp_path)
    pool = [(f"w{i} w{i + 1}", f" w{i % 2}") for i in range(40)]
    monkeypatch.setattr(language.LANGUAGE_TASKS["smollm-movie"], "load", lambda: (pool, [], []))
    monkeypatch.setattr(coherence, "FAR", LAYERS - 1)
    monkeypatch.setattr(sys, "argv", ["coherence", "--steps", "3", "--examples", "16", "--rank", "2"])
    coherence.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "_proj |" in line]
    assert [row[0].strip() for row in rows] == [*tasks.CHAT_LINEAR]
    assert all(0 <= float(cell) <= 1 for row in rows for cell in row[1:])


def test_a_run_on_few_examples_is_tested_elsewhere_and_cut(tmp_path, monkeypatch):
    save_base(tmp_path)
    monkeypatch.setattr(assets, "smollm", lambda: tmp_path)
    examples = [(f"w{i} w{i + 1}", f" w{i % 2}") for i in range(40)]
    task = dataclasses.replace(
        language.LANGUAGE_TASKS["smollm-movie-few-all"], load=lambda: (examples, examples[:20], examples[20:])
    )
    monkeypatch.setitem(language.LANGUAGE_TASKS, "smollm-movie-few-all", task)
    monkeypatch.setattr(language, "rated_prompts", lambda kind: examples[:10])
    line = cell.run("smollm-movie-few-all", "structlora", 4, 8, 1e-2, 0)
    assert line["steps"] == 5 and line["others"].keys() == {"tweet", "product"}
    assert line["truncated"].keys() == {"half", "quarter"}
    parts = (line["validation"], line["test"], *line["others"].values(), *line["truncated"].values())
    assert all(math.isfinite(part["nll"]) and 0 <= part["accuracy"] <= 100 for part in parts)


def test_the_cosine_over_the_stream_is_that_of_whole_matrices_in_any_rank_basis():
    side, other, turn = torch.randn(4, 16, 3), torch.randn(4, 3, 5), torch.linalg.qr(torch.randn(4, 3, 3))[0]
    whole = [(update @ update.T).flatten() for update in side @ other]
    expected = [torch.cosine_similarity(whole[i + 2], whole[i], dim=0).item() for i in range(2)]
    assert coherence.stream_cosine(side, other, 2).tolist() == pytest.approx(expected, rel=1e-4)
    assert coherence.stream_cosine(side @ turn, turn.mT @ other, 2).tolist() == pytest.approx(
        expected, rel=1e-4
    )
