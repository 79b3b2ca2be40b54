"""What training reports about the structure of an adapter, each figure named as in the paper.

gate_openness       mean probability that a direction is open
gate_entropy        mean entropy of the gates, in nats
kl                  mean KL between gates and prior, in nats
effective_rank      exp of the entropy of ΔW's normalised singular values (Roy & Vetterli, 2007), mean over modules
drift_energy        Σ over neighbouring depths of ‖u_l+1 − u_l‖², u the effective node features, summed over kinds
gradient_cosine     mean cosine of neighbouring depths' gradients (of the effective factors, before the pullback:
                    the pullback itself mixes depths, and would raise the cosine by construction)
semantic_edges      number of semantic edges, all kinds
theta_norm          Frobenius norm of the coordinators' Θ, all kinds
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gates import gate_entropy, kl_to_prior
from .mapping import Factors, KindMap
from .regularizers import laplacian


def structure_metrics(maps: list[KindMap], effective: list[Factors]) -> dict[str, float]:
    """The figures above but for `gradient_cosine`, which needs a step's gradients.

    Args:
        maps (`list[KindMap]`): one per kind.
        effective (`list[Factors]`): evaluation factors, one per kind.
    """
    metrics: dict[str, float] = {}
    gated = [m.filter for m in maps if m.filter.logits is not None]
    logits = [f.logits.detach().expand(f.shape).flatten() for f in gated]
    if logits:
        logits = torch.cat([part.to(logits[0].device) for part in logits])
        metrics["gate_openness"] = torch.sigmoid(logits).mean().item()
        metrics["gate_entropy"] = gate_entropy(logits).mean().item()
        metrics["kl"] = kl_to_prior(logits, maps[0].config.prior).mean().item()
    ranks = torch.cat(
        [effective_rank(*m.split(factors)).flatten().cpu() for m, factors in zip(maps, effective, strict=True)]
    )
    metrics["effective_rank"] = ranks.mean().item()
    metrics["drift_energy"] = sum(
        drift_energy(u.flatten(-2)) for m, f in zip(maps, effective, strict=True) for u in m.features(f)
    )
    if any(len(m.coordinators) for m in maps):
        metrics["semantic_edges"] = sum(m.graph.semantic_edge_count for m in maps)
        thetas = [c.theta.detach().norm().cpu() for m in maps for c in m.coordinators.values()]
        metrics["theta_norm"] = torch.stack(thetas).norm().item()
    return metrics


def effective_rank(A: Tensor, B: Tensor) -> Tensor:
    """Effective rank of each BA, from r x r Gram matrices alone: (..., r, k), (..., d, r) -> (...).

    Zero for BA = 0, NaN where values have diverged so far that no singular values are found.
    """
    left, right = B.mT @ B, A @ A.mT  # (..., r, r)
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


def drift_energy(features: Tensor) -> float:
    """Σ_l ‖u_l+1 − u_l‖² of node features (..., L, n), the paper's measure of incoherence over depth."""
    return laplacian(features).item()


def neighbour_cosine(features: Tensor) -> Tensor:
    """Mean cosine of neighbours, (..., L, n) -> scalar tensor."""
    return torch.nn.functional.cosine_similarity(features[..., 1:, :], features[..., :-1, :], dim=-1).mean()


def _square_root(gram: Tensor) -> Tensor:
    try:
        values, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:  # no convergence, near overflow; a figure must not end a run
        return torch.full_like(gram, torch.nan)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2) @ vectors.mT
