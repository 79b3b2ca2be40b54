"""The depth graph (paper, "Graph Neural Network-Style Inter-Layer Update Coordination"): one node per depth of a kind.

Edges join neighbours in depth and, as training goes on, nodes whose running-mean gradients point the same way.

Experts of a mixture are nodes of their layer's depth. Each has these edges to the expert of the same number at other depths, and
is joined to the other experts of its layer by one edge in all, shared out among them: with many experts, their mean would
otherwise drown what comes from other depths. Numbers of experts say nothing across layers; what they learn side by side does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import StructLoRAConfig
from .nodes import Kind
from .width import WHOLE, Width

# On a CPU, deeper graphs than this are multiplied as sparse matrices, so that cost stays linear in depth. GPUs multiply
# dense: fast enough at any depth, and unlike their sparse kernels bit-reproducible, which replicated weights rely on.
_DENSE_DEPTH = 64
_SMALLEST_NORM = 1e-12  # as in `torch.nn.functional.normalize`


def adjacency_edges(depth_count: int) -> Tensor:
    """Edges between neighbours in depth: (L, L) bool, symmetric, no self-loops."""
    edges = torch.zeros(depth_count, depth_count, dtype=torch.bool)
    node = torch.arange(depth_count - 1)
    edges[node, node + 1] = edges[node + 1, node] = True
    return edges


def semantic_edges(features: Tensor, top_k: int, threshold: float, exclude: Tensor, width: Width = WHOLE) -> Tensor:
    """Edges from each node to its `top_k` nearest by cosine, where the cosine is above `threshold`.

    Args:
        features (`Tensor`): (..., L, n) running-mean gradients.
        exclude (`Tensor`): (..., L, L) bool, pairs that are joined already.
        width (`Width`, *optional*): who has the rest of n.

    Returns:
        `Tensor` (..., L, L) bool, symmetric: an edge exists if either node selects it.
    """
    gram = width.sum(features @ features.mT)
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt().clamp(min=_SMALLEST_NORM)
    cosine = (gram / (norms[..., :, None] * norms[..., None, :])).masked_fill_(exclude, -torch.inf)
    cosine.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
    value, neighbour = cosine.topk(min(top_k, cosine.shape[-1] - 1), dim=-1)
    edges = torch.zeros_like(exclude).scatter_(-1, neighbour, value > threshold)
    return edges | edges.mT


def normalize_edges(edges: Tensor, others: int = 0) -> Tensor:
    """Â = D^-1/2 (S + I) D^-1/2 for (..., L, L) edges S; symmetric, eigenvalues in [-1, 1].

    Args:
        others (`int`, *optional*, defaults to 0): what each node's degree counts beside S and itself.
    """
    with_self = edges.float()
    with_self.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    scale = degree_scale(edges, others)
    return scale * with_self * scale.mT


def degree_scale(edges: Tensor, others: int = 0) -> Tensor:
    """The diagonal of D^-1/2, (..., L, 1)."""
    return (edges.sum(-1, keepdim=True) + 1.0 + others).rsqrt()


def mean_of_others(experts: Tensor) -> Tensor:
    """For each expert, the mean over all others: (E, ...) -> (E, ...)."""
    return (experts.sum(0) - experts) / (len(experts) - 1)


class DepthGraph:
    """The graph of one kind: fixed edges, semantic edges that follow the gradients, and Â of both.

    With experts, every shape below has a leading axis E.

    Args:
        fixed (`Tensor`): (L, L) bool, symmetric, without self-loops: edges that stand whatever is learned.
        follows_gradients (`bool`): whether semantic edges are drawn too.
        top_k (`int`): semantic edges each node may ask for.
        threshold (`float`): cosine above which a semantic edge is drawn.
        decay (`float`): decay of the running-mean gradient.
        joins_experts (`bool`, *optional*, defaults to False): whether the experts of a layer are joined, too.
    """

    is_columnwise = (
        True  # `propagate` maps each entry of the last axis by itself; not inherited (`KindMap.is_columnwise`)
    )

    def __init__(
        self,
        fixed: Tensor,
        follows_gradients: bool,
        top_k: int,
        threshold: float,
        decay: float,
        joins_experts: bool = False,
    ):
        self.joins_experts = joins_experts
        self.fixed, self.follows_gradients = fixed, follows_gradients
        self.top_k, self.threshold, self.decay = top_k, threshold, decay
        self.semantic = torch.zeros_like(fixed)  # (L, L)
        self.features: Tensor | None = None  # (L, n) running-mean gradient
        self._refresh()

    @classmethod
    def over_depth(cls, kind: Kind, config: StructLoRAConfig) -> DepthGraph:
        """The paper's graph of a kind; `config.edges` says which edges it has."""
        fixed = adjacency_edges(kind.depth_count).to(kind.device)
        if kind.experts > 1:
            fixed = fixed.expand(kind.experts, -1, -1)
        if config.edges == "similarity":
            fixed = torch.zeros_like(fixed)
        semantic = (config.semantic_top_k, config.semantic_threshold, config.semantic_decay)
        joins_experts = kind.experts > 1 and config.edges != "similarity"
        return cls(fixed, config.edges != "adjacency", *semantic, joins_experts)

    @property
    def edges(self) -> Tensor:
        """(L, L) bool: all edges over depth, without self-loops."""
        return self.fixed | self.semantic

    @property
    def semantic_edge_count(self) -> int:
        """Number of undirected semantic edges."""
        return int(self.semantic.sum()) // 2

    def observe(self, gradients: Tensor) -> None:
        """Take a step's gradients (L, n) into the running mean."""
        if self.features is None:
            self.features = gradients.clone()
        else:
            self.features.lerp_(gradients, 1 - self.decay)

    def rebuild(self, width: Width = WHOLE) -> None:
        """Rebuild the semantic edges from the running-mean gradients, whose n ranks may share."""
        if self.features is not None:
            self.semantic = semantic_edges(self.features, self.top_k, self.threshold, self.fixed, width)
            self._refresh()

    def propagate(self, features: Tensor) -> Tensor:
        """Â h for node features h (L, r, n)."""
        messages = (self._propagation @ features.flatten(-2)).view_as(features)
        if not self.joins_experts:
            return messages
        scale = self._scale[..., None]
        return messages + scale * mean_of_others(scale * features)

    def state_dict(self) -> dict[str, Tensor]:
        state = {"semantic": self.semantic}
        if self.features is not None:
            state["features"] = self.features
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.semantic = state["semantic"].to(self.fixed.device, copy=True)
        self.features = state["features"].to(self.fixed.device, copy=True) if "features" in state else None
        self._refresh()

    def _refresh(self) -> None:
        others = int(self.joins_experts)
        normalized, self._scale = normalize_edges(self.edges, others), degree_scale(self.edges, others)
        sparse = normalized.device.type == "cpu" and normalized.dim() == 2 and len(normalized) > _DENSE_DEPTH
        self._propagation = normalized.to_sparse() if sparse else normalized
