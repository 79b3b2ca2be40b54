"""What training reports about the structure of an adapter. Two figures have the paper's names: drift_energy is the
paper's with our features in place of ΔW, and of gradient_cosine the paper does not say which tensor it is of.

effective_rank      exp of the entropy of ΔW's normalised singular values (Roy & Vetterli, 2007), mean over nodes that
                    keep a direction; left out for VeRA, whose ΔW is made of more than its nodes
drift_energy        Σ over neighbouring depths of ‖u_l+1 − u_l‖², u the effective node features, summed over kinds
gradient_cosine     mean cosine of neighbouring depths' gradients in the first step since the last report, the run's first
                    step left out, in which gradients of lora_A are zero (of the effective factors, before the
                    pullback: the pullback itself mixes depths, and would raise the cosine by construction;
                    left out without a coordinator)
stream_cosine       mean cosine of what neighbouring depths read from the residual stream, or write to it
                    (`stream_cosine`), over the kinds whose role is known; left out where no two neighbours
                    have learned anything
semantic_edges      number of semantic edges, all kinds
theta_norm          Frobenius norm of the coordinators' Θ, all kinds
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .kinds import Factors
from .mapping import KindMap

_SMALLEST_NORM = 1e-8  # as in `torch.nn.functional.cosine_similarity`


def structure_metrics(maps: list[KindMap], effective: Iterable[Factors]) -> dict[str, float]:
    """The figures above except `gradient_cosine`, which needs a step's gradients.

    Args:
        maps (`list[KindMap]`): one per kind.
        effective (`Iterable[Factors]`): the factors that stand in the model, kind by kind.
    """
    ranks, energies = [], []
    cosines = [torch.empty(0, dtype=torch.float32, device="cpu")]
    for m, f in zip(maps, effective, strict=True):
        if m.kind.A:
            kept = slice(None) if m.kept is None else m.kept.any(-1)
            ranks.append(effective_rank(f.B.mT @ f.B, f.A @ f.A.mT)[kept].cpu())
        energies += [laplacian(m.graph.by_expert(u).flatten(2)).cpu() for u in m.features(f).values()]
        pair = m.stream_factors(f)
        if pair is not None:
            products = stream_products(*map(m.graph.by_expert, pair))
            cosines.append(stream_cosine(*products).flatten().cpu())
    metrics: dict[str, float] = {}
    if ranks:
        metrics["effective_rank"] = torch.cat(ranks).mean().item()
    metrics["drift_energy"] = sum(energy.item() for energy in energies)
    mean = torch.cat(cosines).nanmean().item()
    if not math.isnan(mean):
        metrics["stream_cosine"] = mean
    if any(len(m.coordinators) for m in maps):
        metrics["semantic_edges"] = sum(m.graph.semantic_edge_count for m in maps)
        thetas = [c.theta.detach().norm().cpu() for m in maps for c in m.coordinators.values()]
        metrics["theta_norm"] = torch.stack(thetas).norm().item()
    return metrics


def laplacian(features: Tensor) -> Tensor:
    """Σ_l ‖u_l+1 − u_l‖² of node features (..., L, n), a scalar."""
    return (features[..., 1:, :] - features[..., :-1, :]).square().sum()


def neighbour_products(features: Tensor) -> Tensor:
    """Products of each depth with the next, and of both with themselves: (..., L, n) -> (3, ..., L − 1)."""
    later, earlier = features[..., 1:, :], features[..., :-1, :]
    squares = torch.linalg.vecdot(features, features)
    return torch.stack([torch.linalg.vecdot(later, earlier), squares[..., 1:], squares[..., :-1]])


def cosines(products: Tensor) -> Tensor:
    """Cosines of neighbours, from `neighbour_products`: (3, ..., L − 1) -> (..., L − 1)."""
    product, *squares = products
    later, earlier = (square.clamp(min=_SMALLEST_NORM**2).sqrt() for square in squares)
    return product / (later * earlier)


def effective_rank(left: Tensor, right: Tensor) -> Tensor:
    """Effective rank of each BA, from BᵀB and AAᵀ alone: (..., r, r), (..., r, r) -> (...).

    Zero for BA = 0, NaN where values have diverged so far that no singular values are found.
    """
    measurable = (left.isfinite() & right.isfinite()).flatten(-2).all(-1)  # LAPACK raises on NaN and Inf
    left, right = (torch.where(measurable[..., None, None], gram, 0) for gram in (left, right))
    # BA and (BᵀB)^½ (AAᵀ)^½ have the same singular values.
    product = _square_root(left) @ _square_root(right)
    measurable &= product.isfinite().flatten(-2).all(-1)
    singular = torch.linalg.svdvals(torch.where(measurable[..., None, None], product, 0))
    total = singular.sum(-1, keepdim=True)
    share = singular / total.clamp(min=torch.finfo(total.dtype).tiny)
    entropy = -torch.xlogy(share, share).sum(-1)
    rank = torch.where(total[..., 0] > 0, entropy.exp(), 0)
    return torch.where(measurable, rank, torch.nan)


def stream_products(side: Tensor, other: Tensor, apart: int = 1) -> list[Tensor]:
    """The r x r products that `stream_cosine` is made of.

    Args:
        side (`Tensor`): the factor on the stream's side less its origin, its rank axis first: (..., L, r, n).
        other (`Tensor`): the factor on the other side, (..., L, r, p).
        apart (`int`, *optional*, defaults to 1): depths between the two that are compared.

    Returns:
        G = other·otherᵀ (..., L, r, r), side·sideᵀ of each depth (..., L, r, r), and of depths `apart`
        (..., L − apart, r, r), later by earlier.
    """
    later = side[..., apart:, :, :]
    earlier = side[..., : later.shape[-3], :, :]
    return [other @ other.mT, side @ side.mT, later @ earlier.mT]


def stream_cosine(gram: Tensor, own: Tensor, cross: Tensor) -> Tensor:
    """Cosine of what two depths do in the residual stream, from the r x r matrices of `stream_products`.

    A module that writes the stream is compared by M = ΔW ΔWᵀ (d x d), one that reads it by M = ΔWᵀ ΔW (k x
    k), two of a kind by ⟨M, M'⟩ / ‖M‖‖M'‖. The other side of ΔW, a space of the module's own, drops out. So
    does the basis of the rank axis: B·R and R⁻¹·A give the same figure, which a cosine of lora_A or lora_B,
    index by index, does not. M has no negative eigenvalue, so that the figure lies between 0 and 1; for
    random ΔW it is r/n or less.

    ΔW is what training the factor on the stream's side has added: (B − B₀)·A for a writer, where B₀ is zero
    except for PiSSA and the like, and B·(A − A₀) for a reader. In B·A the random A₀ outweighs by far what a
    reader has learned, and the figure would tell whether depths started from one A₀.

    Returns:
        `Tensor` (..., L − apart), NaN where an update is zero or has diverged.
    """
    depths, count = own.shape[-3], cross.shape[-3]
    later, earlier = slice(depths - count, None), slice(0, count)
    # Fourth powers follow, and the figure does not depend on the scale of either depth.
    gram = gram / gram.abs().amax((-2, -1), keepdim=True)
    scale = own.abs().amax((-2, -1), keepdim=True).sqrt()
    cross = cross / scale[..., later, :, :] / scale[..., earlier, :, :]
    norm = _trace_of_product(gram, own / scale / scale, gram).sqrt()
    product = _trace_of_product(gram[..., later, :, :], cross, gram[..., earlier, :, :])
    return product / (norm[..., later] * norm[..., earlier])


def _trace_of_product(one: Tensor, cross: Tensor, two: Tensor) -> Tensor:
    """⟨M, M'⟩ = tr(G C G' Cᵀ), with C = side · side'ᵀ."""
    return ((one @ cross) * (cross @ two)).sum((-2, -1))


def _square_root(gram: Tensor) -> Tensor:
    try:
        values, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:  # no convergence, near overflow; a figure must not end a run
        return torch.full_like(gram, torch.nan)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2) @ vectors.mT
