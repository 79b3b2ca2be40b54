"""Message passing over the depth graph: h ← h + σ(Â h Θ) (paper, "Inter-Layer Update Coordination").

Node features are low-rank factors, (L, r, n) with L depths, r directions and n the width of the shared space. Θ acts on
the rank axis and is shared by all depths of a kind, so the paper's flattened d·k vectors never exist. Θ starts at zero:
a new coordinator changes nothing. Experts, a leading axis of the features, share Θ too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .graph import DepthGraph, mean_of_others
from .width import WHOLE

ACTIVATIONS = {
    "tanh": torch.tanh,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "identity": lambda x: x,
}


class GCN(nn.Module):
    """Graph convolution with residual connections, `layers` rounds of it.

    Args:
        rank (`int`): r, the size of the axis that Θ mixes.
        layers (`int`): rounds of message passing.
        activation (`str`): a key of `ACTIVATIONS`.
    """

    width = WHOLE  # of the features that it is given
    is_columnwise = True  # each entry of the last axis gets its own messages; not inherited (`KindMap.is_columnwise`)

    def __init__(self, rank: int, layers: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.theta = nn.Parameter(torch.zeros(layers, rank, rank))

    def forward(self, features: Tensor, graph: DepthGraph) -> Tensor:
        """What message passing adds to the features: (L, r, n) -> (L, r, n)."""
        added = self.activation(self.aggregate(features, graph, 0, self.theta[0]))
        for layer in range(1, len(self.theta)):
            added = added + self.activation(self.aggregate(features + added, graph, layer, self.theta[layer]))
        return added

    def aggregate(self, features: Tensor, graph: DepthGraph, layer: int, theta: Tensor) -> Tensor:
        messages = graph.propagate(features)
        # One product for each depth: where gradients are needed, `@` would transpose the messages into one matrix, and back.
        mixed = torch.bmm(theta.T.expand(messages[..., 0, 0].numel(), -1, -1), messages.flatten(0, -3))
        return mixed.view_as(messages)


class GAT(GCN):
    """The same with attention in place of the fixed weights of Â.

    A node attends by the profile of its direction norms (r numbers that do not depend on the basis of the shared space).
    Attention starts uniform over neighbours and self; the other experts of a layer are one neighbour, their mean. Its cost
    grows with the square of depth.
    """

    negative_slope = 0.2  # of the LeakyReLU, as in Veličković et al. (2018)
    norm_floor = 1e-6  # keeps the gradient of a norm finite at zero features, where every run starts

    def __init__(self, rank: int, layers: int, activation: str):
        super().__init__(rank, layers, activation)
        self.attention = nn.Parameter(torch.zeros(layers, 2, rank))  # towards target, towards source

    def aggregate(self, features: Tensor, graph: DepthGraph, layer: int, theta: Tensor) -> Tensor:
        to_target, to_source = (self._profile(features) @ self.attention[layer].T).unbind(-1)  # (L,) each
        scores = to_target[..., :, None] + to_source[..., None, :]
        joined = graph.edges | torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~joined, -torch.inf)
        if graph.joins_experts:
            others = mean_of_others(features)
            to_others = to_target + self._profile(others) @ self.attention[layer, 1]
            scores = torch.cat([scores, to_others[..., None]], dim=-1)
        weights = nn.functional.leaky_relu(scores, self.negative_slope).softmax(-1)  # (L, L), or (E, L, L + 1)
        mixed = (weights[..., : scores.shape[-2]] @ features.flatten(-2)).view_as(features)
        if graph.joins_experts:
            mixed = mixed + weights[..., -1, None, None] * others
        return theta.T @ mixed

    def _profile(self, features: Tensor) -> Tensor:
        """Norms of the directions, (L, r), relative to their mean over the graph."""
        norms = (self.width.mean(features.square()) + self.norm_floor**2).sqrt()
        return norms / norms.mean((-2, -1), keepdim=True)


COORDINATORS = {"gcn": GCN, "gat": GAT}
