"""Gates as hooks: the contract of dropout, what their logits learn from, and where the rank axis lies."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from structlora_trl.core.gates import GATES, Bottleneck, Forward, Gate, GumbelGate, nats, openness


def gated(layer: nn.Module, kind=Gate, p: float = 2 / 3, rank: int = 4, **options) -> nn.Module:
    layer.gate = kind(rank, p, **options)
    layer.register_forward_hook(layer.gate)
    return layer


# layer, input, rank axis of its output
CASES = {
    "tokens": (nn.Linear(6, 4, bias=False), (3, 5, 6), -1),
    "rows": (nn.Linear(6, 4, bias=False), (3, 6), -1),
    "images": (nn.Conv2d(3, 4, 2, bias=False), (3, 3, 5, 5), -3),
    "waves": (nn.Conv1d(3, 4, 2, bias=False), (3, 3, 7), -2),
}


@pytest.mark.parametrize("kind", GATES.values())
@pytest.mark.parametrize("case", CASES)
def test_one_gate_for_each_example_and_direction(case, kind):
    layer, shape, axis = CASES[case]
    x = torch.randn(shape)
    expected = layer(x).detach()
    layer = gated(copy.deepcopy(layer), kind, rank_axis=axis)
    ratio = (
        (layer(x) / expected).movedim(axis, 1).flatten(2)
        if len(shape) > 2
        else (layer(x) / expected)[..., None]
    )
    assert ratio.shape[:2] == (3, 4)
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-3, atol=1e-3)
    assert ratio[..., 0].unique().numel() == 12
    layer.eval()
    assert torch.equal(layer(x), expected)


def samples(kind, p: float) -> torch.Tensor:
    torch.manual_seed(0)
    return kind(2, p).sample(torch.ones(200_000, 2)).detach()


@pytest.mark.parametrize("p", [0.3, 0.6, 0.9])
def test_mean_and_variance(p):
    alpha = 1 / p - 1
    assert samples(Gate, p).var().item() == pytest.approx(alpha, rel=0.03)
    for kind in GATES.values():
        assert samples(kind, p).mean().item() == pytest.approx(1, abs=0.02)
    # A Bernoulli over its mean has variance α; relaxed, it has less.
    assert 0 < samples(GumbelGate, p).var().item() < alpha


@pytest.mark.parametrize("kind", GATES.values())
def test_the_gradient_of_logits(kind):
    """Autograd's, beside differences of the loss with the draws fixed."""
    layer, x, weight = gated(nn.Linear(6, 4, bias=False), kind), torch.randn(5, 3, 6), torch.randn(5, 3, 4)

    def loss():
        torch.manual_seed(7)
        return (layer(x) * weight).tanh().sum()

    loss().backward()
    found, step = layer.gate.logits.grad.clone(), 1e-2
    for j in range(4):
        with torch.no_grad():
            layer.gate.forward.has_gradients = True
            layer.gate.logits[j] += step
            above = loss()
            layer.gate.logits[j] -= 2 * step
            below = loss()
            layer.gate.logits[j] += step
        assert found[j].item() == pytest.approx(((above - below) / (2 * step)).item(), rel=2e-2, abs=2e-3)


def test_the_step_descends_the_evidence_bound():
    of = Bottleneck(examples=200, batch_size=10, beta=1.5, lr=0.1)
    logits, target = torch.linspace(-2, 2, 6).requires_grad_(), torch.linspace(-1, 4, 6)  # labels that open
    loss = ((logits - target) ** 2).mean() / 50
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(200 * loss + 1.5 * nats(logits).sum(), logits)
    torch.testing.assert_close(of.step(logits, gradient), logits - 0.1 * 10 / 200 * expected)


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_an_epoch_moves_a_gate_as_far_whatever_the_batch(batch_size):
    of, logits = Bottleneck(64, batch_size, beta=1.0, lr=0.5), torch.tensor([2.0])
    for _ in range(64 // batch_size):
        logits = of.step(logits, torch.zeros(1))
    assert logits.item() == pytest.approx(2 - 0.5 * 0.5 * torch.sigmoid(torch.tensor(2.0)).item(), abs=0.01)


def test_one_odd_batch_neither_opens_nor_closes_a_gate():
    of = Bottleneck(1000, 10, beta=1.0, lr=0.5)
    closing, opening = of.step(torch.zeros(2), torch.tensor([1e6, -1e6])).tolist()
    # As far as the price of an open gate, and a logit.
    assert closing == pytest.approx(-0.5 * 10 / 1000 / 2) and opening == 1
    logits = torch.zeros(2)
    for _ in range(5000):
        logits = of.step(logits, torch.tensor([1e6, -1e6]))
    assert logits.isfinite().all() and 0 < openness(logits)[0] < 0.05 and 0.99 < openness(logits)[1] < 1


def test_where_a_gate_acts():
    forward = Forward()
    layer, x = gated(nn.Linear(6, 4, bias=False), forward=forward), torch.ones(2, 6)
    plain = x @ layer.weight.T

    def acts() -> bool:
        return not torch.equal(layer(x), plain)

    assert acts()
    with torch.no_grad():
        assert not acts()  # a loop that generates or evaluates in `train()`
        forward.has_gradients = True  # a block under reentrant checkpointing
        assert acts()
    layer.eval()
    assert not acts()


@pytest.mark.parametrize("kind", GATES.values())
def test_sequences_of_a_packed_row_have_their_own_draws(kind):
    forward = Forward()
    forward(None, (), {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])})
    m = kind(4, 0.5, forward=forward).sample(torch.ones(2, 6, 4)).detach().expand(2, 6, 4)
    for row, spans in enumerate([[(0, 3), (3, 5), (5, 6)], [(0, 6)]]):
        for start, end in spans:
            assert torch.equal(m[row, start:end], m[row, start].expand(end - start, -1))
    assert m[..., 0].unique().numel() == 4
    assert kind(4, 0.5, forward=forward).sample(torch.ones(3, 4)).shape == (3, 4)  # of pooled rows: as ever


def test_the_identity_that_doras_norm_passes_has_no_noise():
    layer = gated(nn.Linear(6, 4, bias=False))
    layer.gate.skips_identity = True
    assert torch.equal(layer(torch.eye(6)), layer.weight.T)
    assert not torch.equal(layer(torch.ones(6, 6)), layer.weight.sum(1).expand(6, 4))


def test_openness_at_the_start():
    assert openness(Gate(3, 0.9).logits.detach()).tolist() == pytest.approx([0.9] * 3)
    assert math.isclose(Gate(1, 0.5).logits.item(), 0)
