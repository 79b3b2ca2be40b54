"""Message passing over the depth graph: h ← h + σ(Â h Θ) (paper, "Inter-Layer Update Coordination").

Node features are low-rank factors, (N, r, n) with N nodes, r directions and n the width of the shared space.
Θ acts on the rank axis and is shared by all nodes of a kind, so the paper's flattened d·k vectors never
exist. Θ starts at zero: a new coordinator changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .graph import DepthGraph, mean_of_others


class GCN(nn.Module):
    """Graph convolution with residual connections, σ = tanh.

    Args:
        rank (`int`): r, the size of the axis that Θ mixes.
        layers (`int`): rounds of message passing.
    """

    def __init__(self, rank: int, layers: int):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(layers, rank, rank, dtype=torch.float32, device="cpu"))

    def forward(self, features: Tensor, graph: DepthGraph, kept: Tensor | None = None) -> Tensor:
        """What message passing adds to the features: (N, r, n) -> (N, r, n).

        Args:
            kept (`Tensor`, *optional*): (N, r) of bool, the directions that take part; all where omitted.
        """
        added = self._round(0, features, graph, kept)
        for layer in range(1, len(self.theta)):
            added = added + self._round(layer, features + added, graph, kept)
        return added

    def _round(self, layer: int, features: Tensor, graph: DepthGraph, kept: Tensor | None) -> Tensor:
        reached = features if kept is None else features * kept[..., None]
        return torch.tanh(self.aggregate(reached, graph, layer, self.theta[layer], kept))

    def aggregate(
        self, features: Tensor, graph: DepthGraph, layer: int, theta: Tensor, kept: Tensor | None
    ) -> Tensor:
        """Messages of one round before the activation, Â h Θ: (N, r, n) -> (N, r, n)."""
        messages = graph.propagate(features)
        # Not `theta.T @ messages`: where gradients are needed, that transposes the messages into one matrix,
        # and back.
        return torch.bmm(theta.T.expand(len(messages), -1, -1), messages)


class GAT(GCN):
    """Graph attention (Veličković et al., 2018): learned weights of the same edges, in place of the fixed Â.

    A node attends by the profile of its direction norms (r numbers that do not depend on the basis of the
    shared space). Attention starts uniform over neighbours and self; the other experts of a layer are one
    neighbour, their mean. Its cost grows with the square of depth.
    """

    negative_slope = 0.2  # of the LeakyReLU, as in Veličković et al. (2018)
    norm_floor = 1e-6  # keeps the gradient of a norm finite at zero features, where every run starts

    def __init__(self, rank: int, layers: int):
        super().__init__(rank, layers)
        # Of each layer, towards the target and towards the source.
        self.attention = nn.Parameter(torch.zeros(layers, 2, rank, dtype=torch.float32, device="cpu"))

    def aggregate(
        self, features: Tensor, graph: DepthGraph, layer: int, theta: Tensor, kept: Tensor | None
    ) -> Tensor:
        h = graph.by_expert(features)  # (E, L, r, n)
        shares = torch.ones_like(h[..., 0]) if kept is None else graph.by_expert(kept.to(h.dtype))
        to_target, to_source = (self._profile(h, shares) @ self.attention[layer].T).unbind(-1)  # (E, L) each
        scores = to_target[..., :, None] + to_source[..., None, :]
        joined = graph.edges | torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~joined, -torch.inf)
        if graph.joins_experts:
            others = mean_of_others(h)
            profile = self._profile(others, mean_of_others(shares))
            scores = torch.cat([scores, (to_target + profile @ self.attention[layer, 1])[..., None]], dim=-1)
        # (E, L, L) or (E, L, L + 1)
        weights = nn.functional.leaky_relu(scores, self.negative_slope).softmax(-1)
        mixed = (weights[..., : scores.shape[-2]] @ h.flatten(2)).view(h.shape)
        if graph.joins_experts:
            mixed = mixed + weights[..., -1, None, None] * others
        return theta.T @ graph.by_node(mixed)

    def _profile(self, features: Tensor, shares: Tensor) -> Tensor:
        """Root mean squares of the directions, (..., L, r), relative to their mean over those of the graph
        that take part (`shares`, (..., L, r), says how far); 0 for a direction that does not.
        """
        norms = (features.square().mean(-1) + self.norm_floor**2).sqrt()
        norms = torch.where(shares > 0, norms, 0)
        mean = norms.sum((-2, -1), keepdim=True) / shares.sum((-2, -1), keepdim=True).clamp(min=1)
        return norms / mean.clamp(min=self.norm_floor)


COORDINATORS = {"gcn": GCN, "gat": GAT}
