"""Adapters made smaller by every rule: their sizes, that the whole one stands again, LoRA-Squeeze, and the table."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.quality import cell, measures, shrinking, tables
from benchmarks.quality.selection import Runs
from benchmarks.quality.settings import COMPARISONS, SHRUNK_SEEDS
from benchmarks.quality.shrinking import (
    DISTILLED,
    GLOBAL,
    ONE_RANK,
    RULES,
    principal_outputs,
    rank_moments,
    shrink,
)
from structlora_trl.adapters.peft_scaling import singular_directions
from tests.benchmarks.test_evidence import tiny_task  # noqa: F401

pytestmark = pytest.mark.slow

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
        ways = {way for way in ("cut", "distilled") if of_rule.get(way) == {"accuracy": 1.0, "nll": 2.0}}
        assert ways == ({"cut", "distilled"} if rule in DISTILLED else {"cut"})
    order = [(rule, way) for rule in RULES for way in ("cut", "distilled") if way in done[rule]]
    cuts = {rule: error for (rule, way), error in zip(order, errors, strict=True) if way == "cut"}
    assert min(cuts, key=cuts.get) == "global-svd" and min(ONE_RANK, key=cuts.get) == "svd"
    for name, (A, B) in measures.lora_factors(model).items():
        torch.testing.assert_close(B @ A, updates[name])


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(10, 12)

    def forward(self, x):
        return self.linear(x)


def test_principal_outputs_are_the_best_of_their_rank_on_the_inputs():
    """The mean square of what is lost is that of the components dropped, and less than with singular directions."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["linear"], init_lora_weights=False)
    model = get_peft_model(Layer().double(), lora).eval()
    rows = [{"x": torch.randn(20, 10).double() * torch.logspace(0, -2, 10)} for _ in range(10)]
    inputs = torch.cat([row["x"] for row in rows])
    ((A, B),) = measures.lora_factors(model).values()
    update = (B @ A).detach()
    parts = singular_directions(A.detach(), B.detach())
    with torch.no_grad():
        A.copy_(parts.A)
        B.copy_(parts.B)
    (moments,) = rank_moments(model, rows).values()
    new_A, new_B, energy = principal_outputs(parts.A, parts.B, moments)
    torch.testing.assert_close(new_B @ new_A, update)

    def lost(A_, B_, k):
        return (inputs @ (update - B_[:, :k] @ A_[:k]).T).square().sum(1).mean()

    for k in range(1, 4):
        torch.testing.assert_close(lost(new_A, new_B, k), energy[k:].sum())
        assert lost(new_A, new_B, k) < lost(parts.A, parts.B, k)


def test_squeeze_leaves_the_rank_asked_for(tiny_task):  # noqa: F811
    models = []
    original = measures.logits_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cell, "logits_of", lambda model, split: (models.append(model), original(model, split))[1]
        )
        cell.run("digits", "squeeze:to=2", RANK, 20, 1e-2, 0)
    for A, B in measures.lora_factors(models[0]).values():
        assert int(B.any(0).sum()) == int(A.any(1).sum()) == 2


def test_the_table_pairs_with_lora_at_the_rank_that_is_left():
    comparison = COMPARISONS["shrunk-quarter-of-16"]
    places = tuple(replace(place, rates=(0.1,)) for place in comparison.places)
    comparison = replace(comparison, places=places, groups={"all": places})

    def line(place, method, rank, seed, accuracy, shrunk=None):
        keys = {"task": place.task, "examples": place.examples, "rank": rank, "method": method}
        figures = {"accuracy": accuracy, "nll": 1.0}
        return {**keys, "lr": 0.1, "seed": seed, "validation": figures, "test": figures, "shrunk": shrunk}

    lines = []
    for place in places:
        for seed in SHRUNK_SEEDS[:2]:
            parts = {
                "cut": {"accuracy": 70.0 + seed, "nll": 0.5},
                "distilled": {"accuracy": 72.0 + seed, "nll": 0.5},
            }
            lines += [
                line(place, "lora", 4, seed, 69.0 + seed),
                line(place, "lora", 16, seed, 73.0 + seed),
                line(place, "shrink:keep=0.25", 16, seed, 73.0 + seed, {"activations": parts}),
            ]
    found = tables.compared(Runs(lines), comparison)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in found.splitlines()[2:]]
    shown = {row[0]: row[1:] for row in rows}
    assert list(shown) == [
        "LoRA trained at rank 4",
        "the whole adapter, rank 16",
        "activations, cut",
        "activations, distilled",
    ]
    seeds, accuracy, nll, *gaps = shown["activations, distilled"]
    assert (seeds, accuracy, nll) == ("2", "372.5", "0.500")
    assert gaps[0].startswith("+3.0 (") and gaps[2].startswith("-1.0 (")
