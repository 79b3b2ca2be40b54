"""A cut after training: how many directions each rule leaves, that the adapter stands again afterwards, and what is chosen."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.quality import after_training, cell, measures, selection, tables
from benchmarks.quality.after_training import AT_HALF, SHARES, cut
from benchmarks.quality.settings import CUT_SEEDS
from benchmarks.quality.tasks import TASKS
from tests.benchmarks.test_evidence import tiny_task  # noqa: F401

RANK, SEED = 8, CUT_SEEDS[0]


@pytest.fixture
def trained(tiny_task, monkeypatch):  # noqa: F811
    """The model of a short run, with its task's splits."""
    found = {}
    monkeypatch.setattr(
        after_training, "cut", lambda model, *splits: found.update(model=copy.deepcopy(model), splits=splits)
    )
    cell.run("digits", "structlora", RANK, 20, 1e-2, SEED)
    return found["model"], *found["splits"][:2]


def test_each_rule_leaves_its_share_and_the_whole_adapter_stands_afterwards(trained):
    model, training, validation = trained
    factors = measures.lora_factors(model)
    updates = {name: (B @ A).detach() for name, (A, B) in factors.items()}
    total = len(factors) * RANK
    whole = measures.evaluate(model, TASKS["digits"].load()[2])

    def left() -> dict:
        return {"accuracy": sum(int(B.any(0).sum()) for _, B in factors.values()), "nll": 0.0}

    found = cut(model, training, validation, 0, left)
    for rule, by_share in found.items():
        assert by_share.keys() == {name for name in SHARES if name != "half" or rule in AT_HALF}
        for name, figures in by_share.items():
            assert figures["accuracy"] == round(total * SHARES[name])
    for name, (A, B) in factors.items():
        torch.testing.assert_close(B @ A, updates[name])
    assert measures.evaluate(model, TASKS["digits"].load()[2])["nll"] == pytest.approx(whole["nll"], abs=1e-4)


def test_the_largest_singular_values_are_nearest_to_the_update(trained):
    model, training, validation = trained
    factors = measures.lora_factors(model)
    updates = {name: (B @ A).detach() for name, (A, B) in factors.items()}

    def error() -> dict:
        return {
            "accuracy": float(sum((B @ A - updates[n]).square().sum() for n, (A, B) in factors.items())),
            "nll": 0.0,
        }

    errors = {
        rule: by_share["eighth"]["accuracy"]
        for rule, by_share in cut(model, training, validation, 0, error).items()
    }
    assert min(errors, key=errors.get) == "singular"


def test_a_cell_keeps_the_figures_of_adapters_that_are_plain_lora(tiny_task):  # noqa: F811
    for method, is_cut in (("lora", True), ("structlora", True), ("dora", False)):
        line = cell.run("digits", method, RANK, 20, 1e-2, SEED)
        assert ("cut" in line) == is_cut
    assert "cut" not in cell.run("digits", "lora", 4, 20, 1e-2, SEED)


def test_the_table_at_equal_size_pairs_by_seed_and_averages_over_settings():
    """Two tasks, three seeds; the last seed lacks a run of one task, so that no figure counts it."""

    def line(task, method, rank, seed, accuracy, cut=None):
        keys = {"task": task, "rank": rank, "examples": 9, "method": method, "lr": 0.1, "seed": seed}
        figures = {"accuracy": accuracy, "nll": 1.0}
        found = {"cut": {"singular": {"quarter": {"accuracy": cut, "nll": 1.5}}}} if cut is not None else {}
        return {**keys, "validation": figures, "test": figures, **found}

    lines = []
    for task, easier in (("a", 0), ("b", 10)):
        for seed in range(3 if task == "a" else 2):
            lines += [
                line(task, "lora", 2, seed, 60 + easier + seed),
                line(task, "lora", 8, seed, 64 + easier + seed, cut=63 + easier - seed),
                line(task, "structlora:keep=0.25", 8, seed, 65 + easier + 3 * seed),
                line(task, "structlora:keep=0.25,select_by=random", 8, seed, 64 + easier),
                line(task, "structlora", 8, seed, 66 + easier),
            ]
    found = tables.at_equal_size(selection.Runs(lines), [("a", 8, 9), ("b", 8, 9)], "quarter")
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in found.splitlines()[2:]]
    shown = {row[0]: row[1:] for row in rows}
    assert list(shown) == [
        "LoRA trained at that rank",
        "StructLoRA, keep=0.25, by information",
        "StructLoRA, keep=0.25, random",
        "LoRA, cut after training: largest singular values",
        "LoRA, whole",
        "StructLoRA, whole",
    ]
    assert shown["LoRA trained at that rank"][:3] == ["2", "65.5", "1.000"]
    ours = shown["StructLoRA, keep=0.25, by information"]
    reach = 12.706 * (2**0.5 / 2**0.5)  # of +5 and +7 over two seeds, Student's t at one degree of freedom
    assert ours[1] == "71.5" and ours[3] == f"+6.0 ({6 - reach:+.1f} to {6 + reach:+.1f})"
    assert ours[5].startswith("+0.5 (")  # less StructLoRA's own whole adapter: -1 and +2
    assert ours[7].startswith("+2.5 (")  # less the random draw: +1 and +4
    cut = shown["LoRA, cut after training: largest singular values"]
    assert cut[1:3] == ["67.5", "1.500"] and cut[5].startswith("-2.0 (")
