"""Latent factors of evaluation factors that someone else wrote."""

from __future__ import annotations

import pytest
import torch

from structlora_trl.core.inverse import latents_of
from structlora_trl.core.mapping import Factors
from structlora_trl.core.nodes import Heads
from tests.core.test_columns import kind_map


@pytest.mark.parametrize(("experts", "apart"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"side": "both"},
        {"coordinator": "gat"},
        {"coordinator": "none"},
        {"coordinator": "none", "warm": True},
        {"coordinator": "none", "hard_gates": True, "share_gates": True},
        {"filter": "none", "side": "both"},
        {"coordinator": "none", "expert_gates": True},
        {"coordinator": "none", "head_gates": True, "heads": Heads("A", 11)},
        {"head_gates": True, "heads": Heads("B", 7)},
    ],
    ids=str,
)
def test_latents_of_what_was_written_give_it_again(options, experts, apart):
    if experts > 1 and "heads" in options:
        pytest.skip("experts have no heads")
    m, latent = kind_map(experts=experts, apart=apart, **options)
    with torch.no_grad():
        for coordinator in m.coordinators.values():
            coordinator.theta.mul_(0.1)  # messages are small beside what they are added to
        standing = m(latent, None)
        written = Factors(1.1 * standing.A, 0.9 * standing.B)
        found = latents_of(m, written, latent)
        assert found is not None
        assert torch.allclose(m(found, None).A, written.A, rtol=0, atol=1e-5)
        assert torch.allclose(m(found, None).B, written.B, rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_latents(value):
    m, latent = kind_map(coordinator="none")
    with torch.no_grad():
        written = Factors(latent.A, latent.B.clone())
        written.B[0, 0, 0] = value
    assert latents_of(m, written, latent) is None
