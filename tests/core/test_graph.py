"""The depth graph: normalisation, which edges it has, and how experts are joined."""

from __future__ import annotations

import pytest
import torch

from structlora_trl.core.graph import adjacency_edges, semantic_edges
from tests.support.core import graph_over


def test_semantic_edges_follow_the_cosine():
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    features = torch.stack([east, north, 2 * east, -north, torch.zeros(2)])
    gram = features @ features.T
    edges = semantic_edges(gram, top_k=2, threshold=0.5, exclude=adjacency_edges(5))
    assert edges.nonzero().tolist() == [[0, 2], [2, 0]]
    assert not semantic_edges(gram, 2, 0.5, exclude=torch.ones(5, 5, dtype=torch.bool)).any()


@pytest.mark.parametrize(
    "edges, adjacent, semantic", [("hybrid", 2, 1), ("adjacency", 2, 0), ("similarity", 0, 1)]
)
def test_edge_sets(edges, adjacent, semantic):
    graph = graph_over(3, edges=edges)
    if graph.follows_gradients:
        graph.rebuild([torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.1]]])])
    assert graph.semantic_edge_count == semantic
    assert int(graph.edges.sum()) // 2 == adjacent + semantic
