"""The map of a kind and its pullback. Promise 2 (`test_promises.py`) holds them to a model with the map in its graph."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from structlora_trl.core.gates import kl_to_prior
from structlora_trl.core.kinds import Factors
from tests.support.core import kind_map, seeds


@given(
    seed=seeds, a=st.floats(-3, 3), b=st.floats(-3, 3), coordinator=st.sampled_from(["gcn", "gat", "none"])
)
def test_pullback_is_linear_in_the_gradient(seed, a, b, coordinator):
    torch.manual_seed(seed)
    m, latent = kind_map(coordinator=coordinator, side="auto" if coordinator == "none" else "both")
    noise = [torch.randn(4, 3)]
    first, second = (Factors(torch.randn(4, 3, 6), torch.randn(4, 5, 3)) for _ in range(2))
    mixed = Factors(*(a * x + b * y for x, y in zip(first, second, strict=True)))

    def flat(gradient):
        factors, own = m.pullback(latent, gradient, noise)
        return torch.cat([t.flatten() for t in (*factors, *own.values())])

    torch.testing.assert_close(flat(mixed), a * flat(first) + b * flat(second), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("share", [False, True])
def test_objective_of_the_gates(share):
    """φ's gradient is γ times the task's, plus λβ times that of the KL averaged over all gates of the model."""
    m, _ = kind_map(share_gates=share, label_weight=0.25, prior=0.3)
    task = {"filters.0.logits": torch.randn_like(m.filter.logits)}
    total_gates = 10 * m.gate_count
    found = m.objective_gradients(task, kl_scale=0.7 / total_gates)["filters.0.logits"]
    logits = m.filter.logits.detach().clone().requires_grad_()
    kl = kl_to_prior(logits.expand(4, -1), 0.3).sum() / total_gates
    torch.testing.assert_close(
        found, 0.25 * task["filters.0.logits"] + 0.7 * torch.autograd.grad(kl, logits)[0]
    )
