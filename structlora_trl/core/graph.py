"""The depth graph of a kind (paper, "Graph Neural Network-Style Inter-Layer Update Coordination").

Each depth is a node. Edges join neighbours in depth and, as training goes on, nodes whose running-mean
gradients point the same way.

Experts of a mixture are nodes of their layer's depth. Each has these edges to the expert of the same number
at other depths, and is joined to the other experts of its layer by one edge in all, shared out among them:
with many experts, their mean would otherwise drown what comes from other depths.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import StructLoRAConfig
from .kinds import Kind

_SMALLEST_NORM = 1e-12  # as in `torch.nn.functional.normalize`


def adjacency_edges(depth_count: int) -> Tensor:
    """Edges between neighbours in depth: (L, L) bool on the CPU, symmetric, no self-loops."""
    edges = torch.zeros(depth_count, depth_count, dtype=torch.bool, device="cpu")
    node = torch.arange(depth_count - 1, dtype=torch.int64, device="cpu")
    edges[node, node + 1] = edges[node + 1, node] = True
    return edges


def semantic_edges(gram: Tensor, top_k: int, threshold: float, exclude: Tensor) -> Tensor:
    """Edges from each node to its `top_k` nearest by cosine, where the cosine is above `threshold`.

    Args:
        gram (`Tensor`): (..., L, L) products of the nodes' running-mean gradients.
        exclude (`Tensor`): (..., L, L) bool, pairs that are joined already.

    Returns:
        `Tensor` (..., L, L) bool, symmetric: an edge exists if either node selects it.
    """
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt().clamp(min=_SMALLEST_NORM)
    cosine = (gram / (norms[..., :, None] * norms[..., None, :])).masked_fill_(exclude, -torch.inf)
    cosine.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
    value, neighbour = cosine.topk(min(top_k, cosine.shape[-1] - 1), dim=-1)
    edges = torch.zeros_like(exclude).scatter_(-1, neighbour, value > threshold)
    return edges | edges.mT


def normalize_edges(edges: Tensor, others: int = 0) -> Tensor:
    """Â = D^-1/2 (S + I) D^-1/2 of (..., L, L) edges S: fp32, symmetric, eigenvalues in [-1, 1].

    Args:
        others (`int`, *optional*, defaults to 0): what each node's degree counts beside S and itself.
    """
    with_self = edges.to(torch.float32, copy=True)
    with_self.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    scale = degree_scale(edges, others)
    return scale * with_self * scale.mT


def degree_scale(edges: Tensor, others: int = 0) -> Tensor:
    """The diagonal of D^-1/2, (..., L, 1), fp32."""
    return (edges.sum(-1, keepdim=True).to(torch.float32) + 1.0 + others).rsqrt()


def mean_of_others(experts: Tensor) -> Tensor:
    """For each expert, the mean over all others: (E, ...) -> (E, ...)."""
    return (experts.sum(0) - experts) / (len(experts) - 1)


class DepthGraph(nn.Module):
    """The graph of one kind: fixed edges, semantic edges that follow the gradients, and Â of both.

    Nodes are N = L·E in the order (depth, expert); edges join depths of one expert number, (E, L, L). E is 1
    for what is no mixture.

    Args:
        fixed (`Tensor`): (E, L, L) bool, symmetric, no self-loops: edges that stand whatever is learned.
        config (`StructLoRAConfig`): the options of semantic edges.
        follows_gradients (`bool`): whether semantic edges are drawn too.
        joins_experts (`bool`, *optional*, defaults to False): whether the experts of a layer are joined, too.
    """

    decay = 0.9  # of the running mean of gradients
    redraw_every = 10  # steps between two draws of semantic edges

    def __init__(
        self,
        fixed: Tensor,
        config: StructLoRAConfig,
        follows_gradients: bool,
        joins_experts: bool = False,
    ):
        super().__init__()
        self.config, self.follows_gradients, self.joins_experts = config, follows_gradients, joins_experts
        self.register_buffer("fixed", fixed, persistent=False)
        self.register_buffer("semantic", torch.zeros_like(fixed))  # (E, L, L)
        self._refresh()

    @classmethod
    def over_depth(cls, kind: Kind, config: StructLoRAConfig) -> DepthGraph:
        """The paper's graph of a kind; `config.edges` says which edges it has."""
        fixed = adjacency_edges(kind.depth_count).to(kind.device).expand(kind.experts, -1, -1)
        if config.edges == "similarity":
            fixed = torch.zeros_like(fixed)
        joins_experts = kind.experts > 1 and config.edges != "similarity"
        return cls(fixed, config, config.edges != "adjacency", joins_experts)

    @property
    def edges(self) -> Tensor:
        """(E, L, L) bool: all edges over depth, without self-loops."""
        return self.fixed | self.semantic

    @property
    def semantic_edge_count(self) -> int:
        """Number of undirected semantic edges."""
        return int(self.semantic.sum()) // 2

    def by_expert(self, nodes: Tensor) -> Tensor:
        """Anything of the nodes, (N, ...), by expert and depth: (E, L, ...)."""
        return nodes.unflatten(0, (-1, len(self.fixed))).transpose(0, 1)

    def by_node(self, of_experts: Tensor) -> Tensor:
        """The inverse of `by_expert`: (E, L, ...) -> (N, ...)."""
        return of_experts.transpose(0, 1).flatten(0, 1)

    def rebuild(self, means: list[Tensor]) -> None:
        """Redraw semantic edges by the cosines of running-mean gradients.

        Args:
            means (`list[Tensor]`): of the nodes on each coordinated side, (N, r, k) or (N, d, r).
        """
        flat = [self.by_expert(mean).flatten(2) for mean in means]  # (E, L, n)
        gram = sum((x @ x.mT for x in flat), torch.zeros_like(self.fixed, dtype=torch.float32))
        top_k, threshold = self.config.semantic_top_k, self.config.semantic_threshold
        self.semantic = semantic_edges(gram, top_k, threshold, self.fixed)
        self._refresh()

    def propagate(self, features: Tensor) -> Tensor:
        """Â h for node features h, (N, r, n) -> (N, r, n)."""
        h = self.by_expert(features)  # (E, L, r, n)
        messages = (self._propagation @ h.flatten(2)).view(h.shape)
        if self.joins_experts:
            scale = self._scale[..., None]
            messages = messages + scale * mean_of_others(scale * h)
        return self.by_node(messages)

    def _refresh(self) -> None:
        others = int(self.joins_experts)
        self._propagation, self._scale = normalize_edges(self.edges, others), degree_scale(self.edges, others)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._refresh()
