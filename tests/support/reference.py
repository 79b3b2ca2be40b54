"""The oracle: the method as the paper writes it, one layer at a time and inside the autograd graph, with no code of ours."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def reference_factors(
    A: list[Tensor],
    B: list[Tensor],
    A0: list[Tensor],
    B0: list[Tensor] | None,
    gates: list[Tensor] | None,
    weights: Tensor,
    theta: dict[str, Tensor],
    activation,
    gates_everything: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Effective factors of one kind, whose nodes are depths, or experts of each depth.

    Args:
        A0, B0: where the update starts from; B0 is None for zero.
        gates_everything: whether gates multiply B, and not B - B0 alone.
        gates: per node, what each direction is multiplied with, or None.
        weights: (N, N) of edges, symmetric, with self-loops.
        theta: 'A' and/or 'B' -> (T, r, r) weights of message passing on that side.
    """
    B0 = [torch.zeros_like(b) for b in B] if B0 is None else B0
    held = [torch.zeros_like(b) for b in B] if gates_everything else B0
    B = [
        b if gates is None else h + (b - h) @ torch.diag(gates[i])
        for i, (b, h) in enumerate(zip(B, held, strict=True))
    ]
    if "A" in theta:
        A = _message_passing(
            A, [a - a0 for a, a0 in zip(A, A0, strict=True)], weights, theta["A"], activation
        )
    if "B" in theta:
        features = [(b - b0).T for b, b0 in zip(B, B0, strict=True)]
        B = [b.T for b in _message_passing([b.T for b in B], features, weights, theta["B"], activation)]
    return A, B


def reference_weights(edges: Tensor, joins_experts: bool) -> Tensor:
    """Weights of edges (N, N) between nodes in the order (expert, depth), from those over depth, (E, L, L) bool without
    self-loops; experts of a layer share an edge among all others of it where they are joined.
    """
    E, L, _ = edges.shape
    weights = torch.zeros(E, L, E, L)
    for e in range(E):
        weights[e, :, e] = edges[e].float() + torch.eye(L)
        for other in range(E):
            if other != e and joins_experts:
                weights[e, :, other] += torch.eye(L) / (E - 1)
    return weights.view(E * L, E * L)


def _message_passing(values, features, weights, thetas, activation):
    degree = weights.sum(1)
    h = list(features)
    for theta in thetas:
        messages = [
            sum(
                (degree[i] * degree[j]) ** -0.5 * weights[i, j] * (theta.T @ h[j])
                for j in range(len(h))
                if weights[i, j]
            )
            for i in range(len(h))
        ]
        h = [own + activation(message) for own, message in zip(h, messages, strict=True)]
    return [value + new - old for value, new, old in zip(values, h, features, strict=True)]


def reference_expected_gate(logits: Tensor, temperature: float, draws: int = 100_000) -> Tensor:
    """Mean of the binary-concrete gate, over as many quantiles of its noise."""
    quantile = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    return (
        torch.sigmoid((logits.double()[..., None] + quantile.logit()) / temperature).mean(-1).to(logits.dtype)
    )


def reference_kl(logits: Tensor, prior: float) -> Tensor:
    """Mean KL between the gates and the prior, by torch's own distributions."""
    gate, target = (
        torch.distributions.Bernoulli(logits=logits),
        torch.distributions.Bernoulli(torch.tensor(prior, device=logits.device)),
    )
    return torch.distributions.kl_divergence(gate, target).mean()


def reference_regularizer(updates: list[Tensor], name: str) -> Tensor:
    """LoRA+Cos or LoRA+Laplacian of one side's updates, a pair of neighbours at a time."""
    total = torch.zeros(())
    for left, right in pairwise(u.flatten() for u in updates):
        if name == "cosine":
            total = total + 1 - (left @ right) / (left.norm() * right.norm())
        else:
            total = total + ((right - left) ** 2).sum()
    return total
