"""A cut after training: how many directions each rule leaves, and that the adapter stands again afterwards."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.quality import after_training, cell, measures
from benchmarks.quality.after_training import AT_HALF, SHARES, cut
from benchmarks.quality.settings import CUT_SEEDS
from benchmarks.quality.tasks import TASKS
from tests.benchmarks.test_evidence import tiny_task  # noqa: F401

pytestmark = pytest.mark.slow

RANK = 8


def test_each_rule_leaves_its_share_and_the_whole_adapter_stands_afterwards(tiny_task, monkeypatch):  # noqa: F811
    found = {}
    monkeypatch.setattr(
        after_training, "cut", lambda model, *splits: found.update(model=copy.deepcopy(model), splits=splits)
    )
    assert "cut" in cell.run("digits", "lora", RANK, 20, 1e-2, CUT_SEEDS[0])
    assert "cut" not in cell.run("digits", "lora", 4, 20, 1e-2, CUT_SEEDS[0])
    assert "cut" not in cell.run("digits", "structlora", RANK, 20, 1e-2, CUT_SEEDS[0])

    model, (training, validation, *_) = found["model"], found["splits"]
    factors = measures.lora_factors(model)
    updates = {name: (B @ A).detach() for name, (A, B) in factors.items()}
    whole = measures.evaluate(model, TASKS["digits"].load()[2])

    def left() -> dict:
        """As accuracy how many directions are left, as NLL how far the update is from the whole."""
        error = sum((B @ A - updates[name]).square().sum() for name, (A, B) in factors.items())
        return {"accuracy": sum(int(B.any(0).sum()) for _, B in factors.values()), "nll": float(error)}

    found = cut(model, training, validation, 0, left)
    for rule, by_share in found.items():
        assert by_share.keys() == {name for name in SHARES if name != "half" or rule in AT_HALF}
        for name, figures in by_share.items():
            assert figures["accuracy"] == round(len(factors) * RANK * SHARES[name])
    assert min(found, key=lambda rule: found[rule]["eighth"]["nll"]) == "singular"
    for name, (A, B) in factors.items():
        torch.testing.assert_close(B @ A, updates[name])
    assert measures.evaluate(model, TASKS["digits"].load()[2])["nll"] == pytest.approx(whole["nll"], abs=1e-4)
