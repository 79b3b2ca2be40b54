"""The map of a kind and its pullback. Promise 2 (`test_promises.py`) holds them to a model with the map in its graph."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from structlora_trl.core.kinds import Factors
from tests.support.core import kind_map, seeds


@given(seed=seeds, a=st.floats(-3, 3), b=st.floats(-3, 3), coordinator=st.sampled_from(["gcn", "gat"]))
def test_pullback_is_linear_in_the_gradient(seed, a, b, coordinator):
    torch.manual_seed(seed)
    m, latent = kind_map(coordinator=coordinator, side="both")
    first, second = (Factors(torch.randn(4, 3, 6), torch.randn(4, 5, 3)) for _ in range(2))
    mixed = Factors(*(a * x + b * y for x, y in zip(first, second, strict=True)))

    def flat(gradient):
        factors, own = m.pullback(latent, gradient)
        return torch.cat([t.flatten() for t in (*factors, *own.values())])

    torch.testing.assert_close(flat(mixed), a * flat(first) + b * flat(second), atol=1e-3, rtol=1e-3)
