"""The map of a kind and its pullback. Promise 2 (`test_promises.py`) holds them to a model with the map in its graph."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from structlora_trl.core.kinds import SIDES
from tests.support.core import kind_map, seeds


@given(seed=seeds, a=st.floats(-3, 3), b=st.floats(-3, 3), coordinator=st.sampled_from(["gcn", "gat"]))
def test_pullback_is_linear_in_the_gradient(seed, a, b, coordinator):
    torch.manual_seed(seed)
    m, latent = kind_map(coordinator=coordinator, side="both")
    for side, factor in zip(SIDES, latent, strict=True):
        first, second = (torch.randn(factor.shape) for _ in range(2))

        def flat(gradient, side=side, factor=factor):
            pulled, own = m.pullback(side, factor, gradient)
            return torch.cat([t.flatten() for t in (pulled, *own)])

        mixed = flat(a * first + b * second)
        torch.testing.assert_close(mixed, a * flat(first) + b * flat(second), atol=1e-3, rtol=1e-3)
