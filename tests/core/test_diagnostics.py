"""The cosine in the residual stream: against the matrices that it never forms, and where there is nothing to compare."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from structlora_trl.core.diagnostics import effective_rank, stream_cosine, stream_products
from structlora_trl.core.kinds import residual_role
from tests.support.tiny import FAMILIES, attached, lora_parameters, peft_model, train


def factors(
    seed: int, depths: int = 5, rank: int = 3, n: int = 12, p: int = 7, experts: tuple[int, ...] = ()
):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*experts, depths, rank, size, generator=generator) for size in (n, p)]


def cosine_of(side, other, apart: int = 1):
    return stream_cosine(*stream_products(side, other, apart))


def formed(update: torch.Tensor, apart: int = 1) -> torch.Tensor:
    """From the n x n matrices, of updates (..., L, p, n)."""
    matrices = (update.mT @ update).double().flatten(-2)
    count = matrices.shape[-2]
    return torch.cosine_similarity(matrices[..., apart:, :], matrices[..., : count - apart, :], dim=-1)


@given(seed=st.integers(0, 2**31 - 1), apart=st.integers(1, 4), experts=st.sampled_from([(), (2,)]))
def test_stream_cosine_is_that_of_the_whole_matrices(seed, apart, experts):
    side, other = factors(seed, experts=experts)
    found = cosine_of(side, other, apart).double()
    torch.testing.assert_close(found, formed(other.mT @ side, apart), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("side_of_1", "other_of_1"), [(0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (math.inf, 1.0), (1.0, -math.inf)]
)
def test_stream_cosine_of_nothing_or_of_diverged_values_is_nan_there_alone(side_of_1, other_of_1):
    side, other = factors(0)
    expected = cosine_of(side, other)
    side[1] *= side_of_1
    other[1] *= other_of_1
    found = cosine_of(side, other)
    assert found.isnan().tolist() == [True, True, False, False]
    torch.testing.assert_close(found[2:], expected[2:])


def learned(model, kind, start: dict, role: str) -> torch.Tensor:
    """What the factor on the stream's side has added to the weights, as PEFT makes them: (L, p, n)."""
    side = "A" if role == "read" else "B"
    updates = []
    for name, moved in zip(kind.modules, getattr(kind, side), strict=True):
        module = model.get_submodule(name)
        with torch.no_grad():
            whole, now = module.get_delta_weight("default").clone(), moved.clone()
            moved.copy_(start[moved])
            update = whole - module.get_delta_weight("default")
            moved.copy_(now)
        updates.append(update if role == "read" else update.mT)
    return torch.stack(updates, dim=-3)


@pytest.mark.parametrize(
    ("family", "init", "options"),
    [
        ("llama", "fresh", {}),
        ("llama", "fresh", {"coordinator": "none"}),  # where each depth has an A₀ of its own
        ("llama", "pissa", {}),
        ("bert", "fresh", {}),
        ("vit", "rslora", {}),
    ],
)
def test_the_figure_is_that_of_what_the_weights_have_learned(family, init, options):
    model, optimizer, runtime = attached(peft_model(family, init, FAMILIES[family].linear), **options)
    start = {
        p: p.detach().clone() if init == "pissa" or "lora_A" in name else torch.zeros_like(p)
        for name, p in lora_parameters(model).items()
    }
    train(model, family, optimizer, 3)
    found = runtime.metrics()["structlora/stream_cosine"]
    runtime.detach()
    pairs = [
        formed(learned(model, kind, start, role)).flatten()
        for kind in runtime.kinds
        if (role := residual_role(kind, None)) and kind.depth_count > 1
    ]
    assert len(pairs) > 1
    assert found == pytest.approx(torch.cat(pairs).mean().item(), abs=1e-3)


@pytest.mark.parametrize(
    ("why", "targets", "options", "steps"),
    [
        ("nothing is learned yet", None, {}, 0),
        ("a module's role is unknown", ["lm_head"], {"coordinator": "none"}, 3),
        ("the readers' start is not kept", None, {"side": "write"}, 3),
        ("one depth", r".*layers\.1\..*(q|o)_proj", {"coordinator": "none"}, 3),
        ("an embedding", ["embed_tokens"], {"coordinator": "none"}, 3),
    ],
)
def test_no_figure(why, targets, options, steps):
    model, optimizer, runtime = attached(peft_model(targets=targets), **options)
    train(model, "llama", optimizer, steps)
    assert "structlora/stream_cosine" not in runtime.metrics(), why


def rank_of(A, B):
    return effective_rank(B.mT @ B, A @ A.mT)


@given(seed=st.integers(0, 2**31 - 1))
def test_effective_rank_is_that_of_the_product(seed):
    torch.manual_seed(seed)
    A, B = torch.randn(3, 4, 7), torch.randn(3, 6, 4)
    singular = torch.linalg.svdvals((B @ A).double())
    share = singular / singular.sum(1, keepdim=True)
    expected = torch.exp(-(share * share.clamp(min=1e-30).log()).sum(1))
    torch.testing.assert_close(rank_of(A, B).double(), expected, atol=1e-2, rtol=1e-2)
    assert rank_of(A, torch.zeros(3, 6, 4)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_effective_rank_of_diverged_factors_is_nan_and_no_error(value):
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 4, 8, generator=generator), torch.randn(3, 6, 4, generator=generator)
    expected = rank_of(A, B)
    B[1, 0, 0] = value
    found = rank_of(A, B)
    assert found[1].isnan()
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
