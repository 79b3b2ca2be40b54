"""The map on blocks of columns gives what it gives on whole stacks, and only where its parts allow it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from structlora_trl import StructLoRAConfig
from structlora_trl.core import columns
from structlora_trl.core.coordinator import GCN
from structlora_trl.core.filters import InformationBottleneck
from structlora_trl.core.graph import DepthGraph
from structlora_trl.core.mapping import Factors, KindMap, Parts, maps_by_row
from structlora_trl.core.nodes import Adapted, Heads, Kind

DEPTHS, RANK, WIDTH_IN, WIDTH_OUT = 4, 3, 11, 7


class SameGates(InformationBottleneck):
    pass


class SameGraph(DepthGraph):
    pass


class SameMessages(GCN):
    pass


def kind_map(
    experts: int = 1,
    apart: bool = False,
    warm: bool = False,
    parts: Parts = Parts(),  # noqa: B008
    heads: Heads | None = None,
    **options,
) -> tuple[KindMap, Factors]:
    torch.manual_seed(0)
    each = experts if apart else 1  # modules of a layer
    rows = RANK * experts // each
    latent = Factors(torch.randn(DEPTHS * each, rows, WIDTH_IN), torch.randn(DEPTHS * each, WIDTH_OUT, rows))
    kind = Kind(
        "layers.*.q_proj",
        [f"layers.{depth}.experts.{expert}.q_proj" for depth in range(DEPTHS) for expert in range(each)],
        *([nn.Parameter(f) for f in side] for side in latent),
        Adapted(experts=experts // each),
        heads,
        each,
    )
    origin_B = torch.randn_like(latent.B) if warm else None
    m = KindMap(kind, StructLoRAConfig(**options), torch.randn(1, *latent.A.shape[1:]), origin_B, parts)
    with torch.no_grad():
        for parameter in m.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return m, latent


def blocks_of(monkeypatch, width: int) -> None:
    monkeypatch.setattr(columns, "_CPU_ENTRIES", 1)
    monkeypatch.setattr(columns, "_LEAST_WIDTH", width)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("has_noise", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"side": "both"},
        {"side": "write", "warm": True},
        {"side": "both", "warm": True, "coordinator_layers": 2},
        {"side": "both", "experts": 2},
        {"side": "both", "experts": 2, "expert_gates": True},
        {"side": "both", "experts": 3, "apart": True, "warm": True},
        {"side": "write", "experts": 3, "apart": True, "expert_gates": True, "share_gates": True},
        {"share_gates": True},
        {"hard_gates": True, "coordinator": "none"},
        {"filter": "random", "side": "both"},
        {"filter": "none", "side": "both"},
        {"filter": "none", "coordinator": "none"},
    ],
    ids=str,
)
def test_blocks_give_what_the_whole_gives(monkeypatch, options, has_noise, width):
    m, latent = kind_map(**options)
    noise = torch.randn(m.noise_shape) if has_noise else None
    gradient = Factors(*map(torch.randn_like, latent))
    assert m.is_columnwise
    blocks_of(monkeypatch, width)
    kept = {}
    with torch.no_grad():
        found = m(latent, noise)
        found_kept = [f.clone() for f in m(latent, noise, kept=kept)]
    pulled, own = m.pullback(latent, gradient, noise, 4.0)
    pulled_kept = m.pullback(latent, gradient, noise, 4.0, kept)[0]
    monkeypatch.setattr(KindMap, "is_columnwise", False)
    with torch.no_grad():
        expected = m(latent, noise)
    expected_pulled, expected_own = m.pullback(latent, gradient, noise, 4.0)
    torch.testing.assert_close([*found, *found_kept], [*expected, *expected])
    torch.testing.assert_close([*pulled, *pulled_kept], [*expected_pulled, *expected_pulled])
    torch.testing.assert_close(own, expected_own)


@pytest.mark.parametrize("is_columnwise", [True, False])
def test_a_side_that_is_not_asked_for_is_none(is_columnwise):
    m, latent = kind_map(filter="ib" if is_columnwise else "topk_norm")
    assert m.is_columnwise == is_columnwise
    with torch.no_grad():
        A, B = m(latent, None, ("B",))
        torch.testing.assert_close(B, m(latent, None).B)
    assert A is None


def test_a_factor_that_nothing_acts_on_is_not_copied():
    m, latent = kind_map(coordinator="none")
    gradient = Factors(*map(torch.randn_like, latent))
    with torch.no_grad():
        assert m(latent, None).A is latent.A
    assert m.pullback(latent, gradient, None)[0].A is gradient.A


def test_what_is_kept_is_written_again():
    m, latent = kind_map(side="both")
    kept = {}
    with torch.no_grad():
        first = m(latent, None, kept=kept)
        pulled, _ = m.pullback(latent, Factors(*map(torch.randn_like, latent)), None, kept=kept)
        assert [f.data_ptr() for f in first] == [f.data_ptr() for f in pulled]
        assert m(latent, None).A.data_ptr() != first.A.data_ptr()


@pytest.mark.parametrize(
    ("parts", "options"),
    [
        (Parts(), {"filter": "topk_norm"}),
        (Parts(), {"coordinator": "gat"}),
        (Parts(filter=SameGates), {}),
        (Parts(coordinator=SameMessages), {}),
        (Parts(graph=SameGraph.over_depth), {}),
    ],
)
def test_parts_that_do_not_claim_to_act_on_columns_are_given_the_whole(monkeypatch, parts, options):
    """A subclass does not inherit the claim: what it changes may sum over the width."""
    m, latent = kind_map(parts=parts, **options)
    assert not m.is_columnwise
    monkeypatch.setattr(columns, "_blocks", None)
    with torch.no_grad():
        m(latent, None)
    m.pullback(latent, Factors(*map(torch.randn_like, latent)), None)


@pytest.mark.parametrize("has_noise", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"experts": 2},
        {"coordinator": "none"},
        {"coordinator": "none", "experts": 2, "share_gates": True, "hard_gates": True},
        {"coordinator": "none", "experts": 2, "expert_gates": True},
        {"experts": 3, "apart": True, "expert_gates": True},
        {"coordinator": "none", "experts": 2, "apart": True, "share_gates": True},
        {"coordinator": "none", "heads": Heads("A", 11), "head_gates": True},
        {"coordinator": "gat"},  # which is not mapped by columns
        {"filter": "random"},
    ],
    ids=str,
)
def test_rows_give_what_the_stack_gives(options, has_noise):
    m, latent = kind_map(**options)
    noise = torch.randn(m.noise_shape) if has_noise else None
    gradient = Factors(*map(torch.randn_like, latent))
    counts = [WIDTH_OUT, 2, 0, 1] * m.kind.per_depth  # of the modules' rows, as a rank may own them

    def own(factors: Factors) -> Factors:
        return factors._replace(
            B=torch.cat([B[:count] for B, count in zip(factors.B, counts, strict=True)]).unsqueeze(1)
        )

    def others_zero(factors: Factors) -> Factors:
        B = torch.zeros_like(factors.B)
        for depth, count in enumerate(counts):
            B[depth, :count] = factors.B[depth, :count]
        return factors._replace(B=B)

    assert maps_by_row(m.kind, m.config)
    with torch.no_grad():
        expected, found = own(m(latent, noise)), m(own(latent), noise, rows=counts)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, found, strict=True))
    pulled, sums = m.pullback(latent, others_zero(gradient), noise)
    of_rows, own_sums = m.pullback(own(latent), own(gradient), noise, rows=counts)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(own(pulled), of_rows, strict=True))
    assert all(torch.allclose(sums[name], own_sums[name], atol=1e-5) for name in sums)
