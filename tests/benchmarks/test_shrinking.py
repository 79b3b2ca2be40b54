"""Adapters made smaller by every rule: their sizes, that the whole one stands again, LoRA-Squeeze, and the table."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.quality import cell, grids, measures, selection, shrinking, tables
from benchmarks.quality.settings import SMALLER, SMALLER_SEEDS
from benchmarks.quality.shrinking import GLOBAL, ONE_RANK, RULES, shrink
from tests.benchmarks.test_evidence import tiny_task  # noqa: F401

RANK = 8


def test_every_rule_leaves_as_many_parameters_and_the_whole_adapter_stands_afterwards(tiny_task, monkeypatch):  # noqa: F811
    found = {}

    def keep(model, training, **given):
        found.update(model=copy.deepcopy(model), training=training)
        return {}

    monkeypatch.setattr(shrinking, "shrink", keep)
    cell.run("digits", "shrink:keep=0.25", RANK, 20, 1e-2, 0)
    monkeypatch.undo()
    model, training = found["model"], found["training"]
    updates = {name: (B @ A).detach() for name, (A, B) in measures.lora_factors(model).items()}
    errors = []

    def figures():
        now = measures.lora_factors(model).items()
        errors.append(float(sum((B @ A - updates[name]).square().sum() for name, (A, B) in now)))
        return {"accuracy": 1.0, "nll": 2.0, "ece": 3.0}

    done = shrink(model, training, 0.25, 0, figures)
    assert list(done) == list(RULES)
    budget = done["svd"]["parameters"]
    for rule, of_rule in done.items():
        assert (
            of_rule["parameters"] == budget
            if rule in ONE_RANK
            else 0.8 * budget < of_rule["parameters"] <= budget
        )
        assert (of_rule["rank"] == RANK // 4) == (rule in ONE_RANK) or rule in GLOBAL
        assert of_rule["cut"] == of_rule["distilled"] == {"accuracy": 1.0, "nll": 2.0}
    cuts = dict(zip(RULES, errors[::2], strict=True))
    assert min(cuts, key=cuts.get) == "global-svd" and min(ONE_RANK, key=cuts.get) == "svd"
    for name, (A, B) in measures.lora_factors(model).items():
        torch.testing.assert_close(B @ A, updates[name])


def test_squeeze_leaves_the_rank_asked_for(tiny_task):  # noqa: F811
    models = []
    original = measures.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cell, "evaluate", lambda model, split: (models.append(model), original(model, split))[1]
        )
        cell.run("digits", "squeeze:to=2", RANK, 20, 1e-2, 0)
    for A, B in measures.lora_factors(models[0]).values():
        assert int(B.any(0).sum()) == int(A.any(1).sum()) == 2


def test_the_grid_begins_with_what_the_primary_question_needs():
    cells = grids.cells_of("smaller")
    first = cells[: 3 * len(SMALLER) * 3]
    assert {(method, rank) for _, method, rank, *_ in first} == {
        ("shrink:keep=0.25", 16),
        ("lora", 4),
        ("squeeze:to=4", 16),
    }
    assert {seed for *_, seed in first} == {*SMALLER_SEEDS[:3]} and len({*cells}) == len(cells)


def test_the_table_pairs_with_lora_at_the_rank_that_is_left():
    def line(method, rank, seed, accuracy, shrunk=None):
        keys = {"task": "a", "rank": rank, "examples": 9, "method": method, "lr": 0.1, "seed": seed}
        figures = {"accuracy": accuracy, "nll": 1.0}
        return {**keys, "validation": figures, "test": figures, **({"shrunk": shrunk} if shrunk else {})}

    lines = []
    for seed in range(2):
        parts = {
            how: {"accuracy": 70.0 + seed + 2 * (how == "distilled"), "nll": 0.5}
            for how in ("cut", "distilled")
        }
        lines += [
            line("lora", 4, seed, 69 + seed),
            line("shrink:keep=0.25", 16, seed, 73 + seed, {"activations": parts}),
        ]
    found = tables.smaller(selection.Runs(lines), [("a", 9)], 16, 0.25)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in found.splitlines()[2:]]
    shown = {row[0]: row[1:] for row in rows}
    assert list(shown) == [
        "LoRA trained at rank 4",
        "activations, cut",
        "activations, distilled",
        "the whole adapter, rank 16",
    ]
    assert shown["activations, distilled"][:3] == ["2", "72.5", "0.500"]
    assert shown["activations, distilled"][3].startswith("+3.0 (") and shown["activations, distilled"][
        5
    ].startswith("-1.0 (")
