"""Gates as hooks: the contract of dropout, and where the rank axis lies."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from structlora_trl.core.gates import FEW_PASSES, MANY_PASSES, Gate, noise_share


def gated(layer: nn.Module, **options) -> nn.Module:
    layer.register_forward_hook(Gate(0.5, **options))
    return layer


# layer, input, rank axis of its output, shape of what examples share
CASES = {
    "tokens": (nn.Linear(6, 4, bias=False), (3, 5, 6), -1),
    "rows": (nn.Linear(6, 4, bias=False), (3, 6), -1),
    "images": (nn.Conv2d(3, 4, 2, bias=False), (3, 3, 5, 5), -3),
    "waves": (nn.Conv1d(3, 4, 2, bias=False), (3, 3, 7), -2),
}


@pytest.mark.parametrize("case", CASES)
def test_one_gate_for_each_example_and_direction(case):
    layer, shape, axis = CASES[case]
    x = torch.randn(shape)
    expected = layer(x).detach()
    layer = gated(copy.deepcopy(layer), rank_axis=axis)
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


def test_mean_and_variance():
    layer = gated(nn.Linear(1, 1, bias=False))
    gates = (layer(torch.ones(200_000, 1)) / layer.weight).detach()
    assert gates.mean().item() == pytest.approx(1, abs=0.01)
    assert gates.var().item() == pytest.approx(0.5, rel=0.02)


def test_the_identity_that_doras_norm_passes_has_no_noise():
    layer = gated(nn.Linear(6, 4, bias=False), identity_width=6)
    assert torch.equal(layer(torch.eye(6)), layer.weight.T)
    assert not torch.equal(layer(torch.ones(5, 6)), layer.weight.sum(1).expand(5, 4))


def test_noise_grows_with_the_passes():
    assert noise_share(1) == noise_share(FEW_PASSES) == 0
    assert noise_share(MANY_PASSES) == noise_share(1000) == 1
    between = [noise_share(passes) for passes in (9, 12, 16, 24)]
    assert 0 < between[0] and between == sorted(between) and between[-1] < 1
