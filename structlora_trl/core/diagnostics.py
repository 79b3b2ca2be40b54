"""What training reports about the structure of an adapter, each figure named as in the paper.

gate_openness       mean probability that a direction is open
group_openness      mean probability that a head or an expert is open; left out without gates of these
gate_entropy        mean entropy of the directions' gates, in nats
kl                  mean KL between gates (of directions) and prior, in nats
effective_rank      exp of the entropy of ΔW's normalised singular values (Roy & Vetterli, 2007), mean over modules
drift_energy        Σ over neighbouring depths of ‖u_l+1 − u_l‖², u the effective node features, summed over kinds
gradient_cosine     mean cosine of neighbouring depths' gradients in the first step since the last report (of the effective
                    factors, before the pullback: the pullback itself mixes depths, and would raise the cosine by
                    construction; under FSDP2 and ZeRO left out where nothing compares depths, since ranks do not move what
                    the map does not need)
stream_cosine       mean cosine of what neighbouring depths read from the residual stream, or write to it (`stream_cosine`), over
                    the kinds whose role is known; left out where no two neighbours have learned anything
semantic_edges      number of semantic edges, all kinds
theta_norm          Frobenius norm of the coordinators' Θ, all kinds
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .gates import gate_entropy, kl_to_prior
from .mapping import Factors, KindMap
from .regularizers import laplacian
from .width import WHOLE, Width


def structure_metrics(maps: list[KindMap], effective: list[Factors]) -> dict[str, float]:
    """The figures above except `gradient_cosine`, which needs a step's gradients.

    Args:
        maps (`list[KindMap]`): one per kind.
        effective (`list[Factors]`): evaluation factors, one per kind; this rank's slices where ranks share the width.
    """
    metrics: dict[str, float] = {}
    gated = [m.filter for m in maps if m.filter.logits is not None]
    logits = [f.logits.detach().expand(f.shape).flatten() for f in gated]
    if logits:
        logits = torch.cat([part.to(logits[0].device) for part in logits])
        metrics["gate_openness"] = torch.sigmoid(logits).mean().item()
        metrics["gate_entropy"] = gate_entropy(logits).mean().item()
        metrics["kl"] = kl_to_prior(logits, maps[0].config.prior).mean().item()
    groups = [m.group_openness.flatten().cpu() for m in maps if m.groups is not None]
    if groups:
        metrics["group_openness"] = torch.cat(groups).mean().item()
    ranks = torch.cat(
        [effective_rank(*m.split(factors), m.width).flatten().cpu() for m, factors in zip(maps, effective, strict=True)]
    )
    metrics["effective_rank"] = ranks.mean().item()
    metrics["drift_energy"] = sum(
        drift_energy(u.flatten(-2), m.width) for m, f in zip(maps, effective, strict=True) for u in m.features(f)
    )
    streams = [(m.stream_factors(factors), m.width) for m, factors in zip(maps, effective, strict=True)]
    cosines = [stream_cosine(*pair, width=width).flatten() for pair, width in streams if pair is not None]
    if cosines:
        mean = torch.cat([part.to(cosines[0].device) for part in cosines]).nanmean().item()
        if not math.isnan(mean):
            metrics["stream_cosine"] = mean
    if any(len(m.coordinators) for m in maps):
        metrics["semantic_edges"] = sum(m.graph.semantic_edge_count for m in maps)
        thetas = [c.theta.detach().norm().cpu() for m in maps for c in m.coordinators.values()]
        metrics["theta_norm"] = torch.stack(thetas).norm().item()
    return metrics


def effective_rank(A: Tensor, B: Tensor, width: Width = WHOLE) -> Tensor:
    """Effective rank of each BA, from r x r Gram matrices alone: (..., r, k), (..., d, r) -> (...).

    Zero for BA = 0, NaN where values have diverged so far that no singular values are found.
    """
    left, right = width.sums([B.mT @ B, A @ A.mT])  # (..., r, r)
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


def drift_energy(features: Tensor, width: Width = WHOLE) -> float:
    """Σ_l ‖u_l+1 − u_l‖² of node features (..., L, n), the paper's measure of incoherence over depth."""
    return width.sum(laplacian(features)).item()


def stream_cosine(side: Tensor, other: Tensor, apart: int = 1, width: Width = WHOLE) -> Tensor:
    """Cosine of what two depths do in the residual stream, from r x r matrices alone.

    A module that writes the stream is compared by M = ΔW ΔWᵀ (d x d), one that reads it by M = ΔWᵀ ΔW (k x k), two of a kind
    by ⟨M, M'⟩ / ‖M‖‖M'‖. The other side of ΔW, a space of the module's own, drops out. So does the basis of the rank axis: B·R
    and R⁻¹·A give the same figure, which a cosine of lora_A or lora_B, index by index, does not. M has no negative
    eigenvalue, so that the figure lies between 0 and 1; for random ΔW it is r/n or less.

    ΔW is what training the factor on the stream's side has added: (B − B₀)·A for a writer, where B₀ is zero except for PiSSA and
    the like, and B·(A − A₀) for a reader. In B·A the random A₀ outweighs by far what a reader has learned, and the figure
    would tell whether depths started from one A₀.

    Args:
        side (`Tensor`): the factor on the stream's side less its origin, its rank axis first: (..., L, r, n).
        other (`Tensor`): the factor on the other side, (..., L, r, p).
        apart (`int`, *optional*, defaults to 1): depths between the two that are compared.
        width (`Width`, *optional*): who has the rest of n and p.

    Returns:
        (..., L − apart), NaN where an update is zero or has diverged.
    """
    # Eighth powers follow, and the figure does not depend on the scale.
    side, other = (factor / width.peak(factor, (-2, -1)) for factor in (side, other))
    gram = width.sum(other @ other.mT)  # (..., L, r, r)

    def product(one: slice, two: slice) -> Tensor:
        """⟨M, M'⟩ = tr(G C G' Cᵀ), with C = side · side'ᵀ."""
        cross = width.sum(side[..., one, :, :] @ side[..., two, :, :].mT)
        return ((gram[..., one, :, :] @ cross) * (cross @ gram[..., two, :, :])).sum((-2, -1))

    later, earlier = slice(apart, None), slice(None, max(side.shape[-3] - apart, 0))
    norm = product(slice(None), slice(None)).sqrt()
    return product(later, earlier) / (norm[..., later] * norm[..., earlier])


def _square_root(gram: Tensor) -> Tensor:
    try:
        values, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:  # no convergence, near overflow; a figure must not end a run
        return torch.full_like(gram, torch.nan)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2) @ vectors.mT
