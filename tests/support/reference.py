"""The oracle: the method as the paper writes it, one layer at a time and inside the autograd graph, with no code of ours."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_factors(
    A: list[Tensor],
    B: list[Tensor],
    A0: list[Tensor] | None,
    B0: list[Tensor] | None,
    weights: Tensor,
    theta: dict[str, Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Effective factors of one kind, whose nodes are depths, or experts of each depth.

    Args:
        A0, B0: where the update starts from; B0 is None for zero.
        weights: (N, N) of edges, symmetric, with self-loops.
        theta: 'A' and/or 'B' -> (T, r, r) weights of message passing on that side.
    """
    B0 = [torch.zeros_like(b) for b in B] if B0 is None else B0
    if "A" in theta:
        A = _message_passing(A, [a - a0 for a, a0 in zip(A, A0, strict=True)], weights, theta["A"])
    if "B" in theta:
        features = [(b - b0).T for b, b0 in zip(B, B0, strict=True)]
        B = [b.T for b in _message_passing([b.T for b in B], features, weights, theta["B"])]
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


def _message_passing(values, features, weights, thetas):
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
        h = [own + torch.tanh(message) for own, message in zip(h, messages, strict=True)]
    return [value + new - old for value, new, old in zip(values, h, features, strict=True)]
