"""Filters of directions: what they let pass, what is state, and what still learns."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import one_hot

from structlora_trl import StructLoRAConfig, StructLoRAError
from structlora_trl.core.filters import InformationBottleneck, TopKFilter
from structlora_trl.core.gates import logistic_noise
from structlora_trl.core.kinds import Factors
from tests.support.core import kind_map


def test_filters_at_evaluation():
    for name, expected in {"none": None, "random": None}.items():
        m, latent = kind_map(filter=name)
        assert m.filter.gates(latent, None) is expected
    m, latent = kind_map(filter="topk_norm", gate_init=0.34)
    norms = latent.A.norm(dim=-1) * latent.B.norm(dim=-2)
    assert torch.equal(m.filter.gates(latent, None), one_hot(norms.argmax(-1), 3).float())


@pytest.mark.parametrize("name", ["ib", "random", "topk_norm"])
def test_what_gates_are_divided_by_is_state(name):
    """Another `gate_init` on resume changes no weight, at evaluation or in training."""
    m, latent = kind_map(filter=name)
    other, _ = kind_map(filter=name, gate_init=0.4)
    other.load_state_dict(m.state_dict())
    for noise in (None, [torch.randn(4, 3)]):
        for ours, theirs in zip(m(latent, noise), other(latent, noise), strict=True):
            assert torch.equal(ours, theirs)


def test_random_filter_keeps_the_asked_share_on_average():
    m, latent = kind_map(depth_count=2000, rank=8, filter="random", gate_init=0.6, coordinator="none")
    gates = m.filter.gates(latent, logistic_noise(16000, 0, 0).view(2000, 8))
    assert gates.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert gates.mean().item() == pytest.approx(1, abs=0.03)


def test_closed_directions_of_top_k_still_learn():
    m, latent = kind_map(filter="topk_norm", gate_init=0.34, coordinator="none")
    gradient = Factors(torch.randn(4, 3, 6), torch.randn(4, 5, 3))
    pulled, _ = m.pullback(latent, gradient, None)
    torch.testing.assert_close(pulled.B, gradient.B)


@pytest.mark.parametrize(
    "share, rank, kept", [(0.29, 100, 29), (0.58, 50, 29), (0.5, 4, 2), (0.34, 4, 1), (0.01, 4, 1)]
)
def test_top_k_keeps_that_share(share, rank, kept):
    config = StructLoRAConfig(filter="topk_norm", gate_init=share)
    assert int(TopKFilter((2, rank), config, torch.device("cpu")).keep) == kept


def test_gates_that_underflow_are_refused():
    config = StructLoRAConfig(gate_init=1e-4, temperature=0.01)
    with pytest.raises(StructLoRAError, match="gates that are 0 in fp32.*raise `temperature` or `gate_init`"):
        InformationBottleneck((2, 4), config, torch.device("cpu"))
