"""Message passing over the depth graph: h ← h + σ(Â h Θ) (paper, "Inter-Layer Update Coordination").

Node features are low-rank factors, (N, r, n) with N nodes, r directions and n the width of the shared space.
Θ acts on the rank axis and is shared by all nodes of a kind, so the paper's flattened d·k vectors never
exist. Θ starts at zero: a new coordinator changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .graph import DepthGraph, mean_of_others

ACTIVATIONS = {
    "tanh": torch.tanh,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "identity": lambda x: x,
}


class GCN(nn.Module):
    """Graph convolution with residual connections.

    Args:
        rank (`int`): r, the size of the axis that Θ mixes.
        layers (`int`): rounds of message passing.
        activation (`str`): a key of `ACTIVATIONS`.

    Attributes:
        passing (`Callable`): takes directions that are closed out of features, before each round.
    """

    def __init__(self, rank: int, layers: int, activation: str):
        super().__init__()
        self.passing = lambda features: features
        self.activation = ACTIVATIONS[activation]
        self.theta = nn.Parameter(torch.zeros(layers, rank, rank, dtype=torch.float32, device="cpu"))

    def forward(self, features: Tensor, graph: DepthGraph) -> Tensor:
        """What message passing adds to the features: (N, r, n) -> (N, r, n)."""
        added = self.activation(self.aggregate(features, graph, 0, self.theta[0]))
        for layer in range(1, len(self.theta)):
            reached = self.passing(features + added)
            added = added + self.activation(self.aggregate(reached, graph, layer, self.theta[layer]))
        return added

    def aggregate(self, features: Tensor, graph: DepthGraph, layer: int, theta: Tensor) -> Tensor:
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

    Attributes:
        sum_over_width (`Callable`): where features are slices of the width, sums a tensor over all slices,
            with gradient.
    """

    negative_slope = 0.2  # of the LeakyReLU, as in Veličković et al. (2018)
    norm_floor = 1e-6  # keeps the gradient of a norm finite at zero features, where every run starts

    def __init__(self, rank: int, layers: int, activation: str):
        super().__init__(rank, layers, activation)
        self.sum_over_width = lambda x: x
        # Of each layer, towards the target and towards the source.
        self.attention = nn.Parameter(torch.zeros(layers, 2, rank, dtype=torch.float32, device="cpu"))

    def aggregate(self, features: Tensor, graph: DepthGraph, layer: int, theta: Tensor) -> Tensor:
        h = graph.by_expert(features)  # (E, L, r, n)
        to_target, to_source = (self._profile(h) @ self.attention[layer].T).unbind(-1)  # (E, L) each
        scores = to_target[..., :, None] + to_source[..., None, :]
        joined = graph.edges | torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~joined, -torch.inf)
        if graph.joins_experts:
            others = mean_of_others(h)
            to_others = to_target + self._profile(others) @ self.attention[layer, 1]
            scores = torch.cat([scores, to_others[..., None]], dim=-1)
        # (E, L, L) or (E, L, L + 1)
        weights = nn.functional.leaky_relu(scores, self.negative_slope).softmax(-1)
        mixed = (weights[..., : scores.shape[-2]] @ h.flatten(2)).view(h.shape)
        if graph.joins_experts:
            mixed = mixed + weights[..., -1, None, None] * others
        return theta.T @ graph.by_node(mixed)

    def _profile(self, features: Tensor) -> Tensor:
        """Root mean squares of the directions, (..., L, r), relative to their mean over the graph."""
        squares = features.square().sum(-1)
        sums = self.sum_over_width(torch.cat([squares.flatten(), squares.new_tensor([features.shape[-1]])]))
        norms = (sums[:-1].view(squares.shape) / sums[-1] + self.norm_floor**2).sqrt()
        return norms / norms.mean((-2, -1), keepdim=True)


COORDINATORS = {"gcn": GCN, "gat": GAT}
