"""Directions selected in training: what each rule prefers, what a cut leaves, and runs that share what came before it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality import cell, directions, measures
from benchmarks.quality.directions import RULES, Cut, Selection
from benchmarks.quality.tasks import Split
from tests.benchmarks.test_evidence import tiny_task  # noqa: F401
from tests.support.tiny import adamw, peft_model, train

RANK = 4


@pytest.fixture
def trained():
    """A tiny model after some steps, and its optimizer."""
    model = peft_model("llama", rank=RANK)
    optimizer = adamw(model)
    train(model, "llama", optimizer, 3)
    return model, optimizer


def selection(trained, rule: str, keep: float = 0.25) -> Selection:
    examples = Split({}, torch.zeros(8, dtype=torch.long))
    return Selection(Cut(rule, keep), *trained, examples, steps=4, batch=2, seed=0)


# Gradients of gates over four steps in three directions: steady and small, large on average but noisy, never there.
STEPS = torch.tensor([[1.0, 9.0, 0.0], [1.1, -9.0, 0.0], [0.9, 9.0, 0.0], [1.0, -8.0, 0.1]])


@pytest.mark.parametrize(
    "rule, source, best",
    [
        ("fisher", "training", 1),
        ("true-fisher", "drawn", 1),
        ("held-back", "held back", 1),
        ("snr", "training", 0),
        ("gain", "held back", 2),
    ],
)
def test_what_a_rule_prefers(trained, rule, source, best):
    chosen = selection(trained, rule)
    shape = (len(chosen.modules), RANK)
    for d in STEPS:
        row = torch.cat([d, torch.tensor([0.5])])
        chosen.gradients.setdefault(source, []).append(row.expand(shape))
    assert chosen.scores()[:, :3].argmax(1).tolist() == [best] * shape[0]


@pytest.mark.parametrize("rule", RULES)
def test_what_is_cut_stays_zero_and_the_rest_trains(tiny_task, rule):  # noqa: F811
    line = cell.run("digits", f"select:rule={rule},keep=0.25", RANK, 20, 1e-2, 3)
    found = line["selection"]
    assert found["of"] == 3 * 2 * RANK
    assert found["not_zero"] == sum(found["kept"].values()) == found["of"] // 4
    assert line["trained"] == found["of"] // 4 * (64 + 64)


def test_runs_that_share_what_came_before_the_cut_are_as_if_alone(tiny_task):  # noqa: F811
    names = [f"select:rule={rule},keep=0.5" for rule in ("snr", "uniform", "random")]

    def runs():
        return [cell.run("digits", name, RANK, 20, 1e-2, 3)["test"] for name in names]

    shared = runs()
    alone = []
    for name in names:
        cell.run("digits", "select:rule=random,keep=0.5", RANK, 20, 1e-2, 4)
        cell.run("digits", "select:rule=random,keep=0.5", RANK, 20, 1e-2, 5)  # what was shared is forgotten
        alone.append(cell.run("digits", name, RANK, 20, 1e-2, 3)["test"])
    assert shared == alone


def test_the_singular_basis_changes_neither_the_update_nor_its_gradient(trained):
    model, optimizer = trained
    for A, B in measures.lora_factors(model).values():
        update, pull = (B @ A).detach(), torch.randn(B.shape[0], A.shape[1])  # pull: ∂L/∂(BA)
        for factor, gradient in ((A, B.T @ pull), (B, pull @ A.T)):
            directions.moments(optimizer, factor)[0].copy_(gradient)
        directions.to_singular_basis(A, B, optimizer)
        torch.testing.assert_close(B @ A, update, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(B.norm(dim=0), torch.linalg.svdvals(update)[:RANK], rtol=1e-4, atol=1e-6)
        for factor, gradient in ((A, B.T @ pull), (B, pull @ A.T)):
            torch.testing.assert_close(
                directions.moments(optimizer, factor)[0], gradient, rtol=1e-2, atol=1e-4
            )


def test_uniform_keeps_as_many_in_each_module(trained):
    chosen = selection(trained, "uniform", keep=0.5)
    chosen.cut_now()
    assert chosen.kept.tolist() == [[True, True, False, False]] * len(chosen.modules)


def test_an_unknown_rule_is_refused(trained):
    with pytest.raises(SystemExit, match="true-fisher"):
        selection(trained, "fischer")


def test_the_scalar_is_chosen_on_validation_and_the_adapter_left_as_it_was(trained):
    model, _ = trained
    (_, B), *_ = measures.lora_factors(model).values()
    before = B.detach().clone()

    def figures(of_scale):
        scale = (B / before).nanmean().item()
        return {"nll": of_scale(scale), "accuracy": round(scale, 3)}

    found = measures.scaled(
        model, {"nll": 1.0}, lambda: figures(lambda s: abs(s - 0.5)), lambda: figures(lambda s: s)
    )
    assert found["scale"] == 0.5 and found["accuracy"] == 0.5
    assert torch.equal(B, before)
    assert measures.scaled(model, {"nll": -1.0}, lambda: figures(abs), lambda: figures(abs)) is None
