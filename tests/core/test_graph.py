"""The depth graph: normalisation, which edges it has, and how experts are joined."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from structlora_trl.core.graph import adjacency_edges, normalize_edges, semantic_edges
from tests.support.core import graph_over, graphs
from tests.support.reference import reference_weights


@given(graphs())
def test_normalised_graph_is_symmetric_with_spectrum_in_the_unit_interval(edges):
    normalized = normalize_edges(edges).double()
    torch.testing.assert_close(normalized, normalized.T)
    eigenvalues = torch.linalg.eigvalsh(normalized)
    assert eigenvalues.max().item() == pytest.approx(1, abs=1e-5)
    assert eigenvalues.min() > -1 + 1e-9  # self-loops exclude -1
    root_degree = (edges.sum(1) + 1).double().sqrt()
    torch.testing.assert_close(normalized @ root_degree, root_degree, atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize("edges", ["hybrid", "adjacency", "similarity"])
def test_experts_of_a_layer_are_joined_by_one_edge_shared_out(edges):
    """Beside the edges over depth of each, as the whole matrix of all nodes has it."""
    options = {} if edges == "adjacency" else {"semantic_threshold": 0.0}
    graph = graph_over(3, experts=5, edges=edges, **options)
    if edges != "adjacency":
        gradients = torch.randn(15, 2, 10, generator=torch.Generator().manual_seed(0))
        graph.rebuild([gradients, gradients.mT])
        assert graph.semantic_edge_count > 0
    weights = reference_weights(graph.edges, edges != "similarity")
    scale = weights.sum(1).rsqrt()
    features = torch.randn(5, 3, 2, 4)
    whole = (scale[:, None] * weights * scale) @ features.flatten(0, 1).flatten(1)
    spread = graph.propagate(graph.by_node(features))
    torch.testing.assert_close(graph.by_expert(spread), whole.view_as(features))
    # Whatever the number of experts, what comes from them weighs as much as one neighbour.
    assert (weights.sum(1) - graph.edges.sum(-1).flatten() - 1 == (edges != "similarity")).all()
