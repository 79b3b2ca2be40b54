"""A cut after training: how many directions each rule leaves, and which."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality import after_training, cell, measures, methods, tasks
from tests.benchmarks.test_evidence import tiny_task  # noqa: F401

pytestmark = pytest.mark.slow

RANK = 8


def test_each_rule_leaves_its_share(tiny_task):  # noqa: F811
    task = tasks.find("digits-all@20", 20)
    training = task.training_examples(20, 0)
    model, runtime, _ = cell.train(task, methods.find("structlora:beta=30"), training, RANK, 1e-2, 0)
    factors = measures.lora_factors(model)
    updates = {name: (B @ A).detach() for name, (A, B) in factors.items()}
    open_ones = {}

    def left() -> dict:
        """As accuracy how many directions are left, as NLL how far the update is from the whole."""
        error = sum((B @ A - updates[name]).square().sum() for name, (A, B) in factors.items())
        kept = torch.cat([B.any(0) for _, B in factors.values()])
        open_ones[len(open_ones)] = kept
        return {"accuracy": int(kept.sum()), "nll": float(error), "ece": 0.0}

    found = after_training.cut(model.eval(), runtime, training, 0, left)
    assert tuple(found) == after_training.RULES
    assert all(
        of_rule["quarter"]["accuracy"] == round(len(factors) * RANK / 4)
        for rule, of_rule in found.items()
        if rule != "singular"  # as far as one share of each update's norm allows
    )
    assert found["norm"]["quarter"]["nll"] < found["random"]["quarter"]["nll"]
    # The first rule is openness: no closed direction is more open than a kept one.
    openness = torch.cat([runtime.openness()[name.removesuffix(".default")] for name in factors])
    assert openness[open_ones[0]].min() >= openness[~open_ones[0]].max()
