"""The coordinator over the residual stream, an idea of the suite: nothing at the start, and no basis of the rank axis in it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality.ideas import Stream, StreamGraph
from structlora_trl.core.graph import adjacency_edges

DEPTHS, RANK, WIDTH = 5, 3, 16


@pytest.fixture
def graph():
    graph = StreamGraph(adjacency_edges(DEPTHS), True, 2, 0.05, 0.9)
    graph.rank = RANK
    graph.observe(torch.randn(DEPTHS, RANK * WIDTH))
    graph.rebuild()
    return graph


def coordinator(theta: float, others: torch.Tensor | None) -> Stream:
    made = Stream(RANK, 2, "tanh")
    made.theta.data.fill_(theta).mul_(torch.linspace(0.5, 1.5, made.theta.numel()).view_as(made.theta))
    if others is not None:
        made.others = lambda: others
        apart = (torch.arange(DEPTHS)[:, None] - torch.arange(len(others))[None]).abs()
        made.joins_others = torch.stack([apart == 0, apart == 1])
    return made


def rotations(count: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(count, RANK, RANK))[0]


@pytest.mark.parametrize("joined", [False, True])
def test_no_message_depends_on_a_rank_basis(graph, joined):
    features, others = torch.randn(DEPTHS, RANK, WIDTH), torch.randn(DEPTHS, RANK, WIDTH)
    turns = rotations(DEPTHS)
    added = coordinator(0.7, others if joined else None)(features, graph)
    turned = coordinator(0.7, rotations(DEPTHS) @ others if joined else None)(turns @ features, graph)
    torch.testing.assert_close(turned, turns @ added, rtol=1e-4, atol=1e-5)
    assert added.abs().max() > 0.01


def test_semantic_edges_do_not_depend_on_it_either(graph):
    g = graph.features.view(DEPTHS, RANK, WIDTH)
    turned = StreamGraph(adjacency_edges(DEPTHS), True, 2, 0.05, 0.9)
    turned.rank = RANK
    turned.observe((rotations(DEPTHS) @ g).flatten(1))
    turned.rebuild()
    assert graph.semantic.any() and torch.equal(graph.semantic, turned.semantic)


def test_nothing_at_the_start_and_no_larger_learning_rate(graph):
    features = torch.randn(DEPTHS, RANK, WIDTH)
    assert coordinator(0.0, features)(features, graph).abs().max() < 1e-6
    mixed = features + coordinator(3.0, features)(features, graph)
    torch.testing.assert_close(mixed.flatten(1).norm(dim=1), features.flatten(1).norm(dim=1), rtol=1e-4, atol=1e-5)


def test_zero_features_have_finite_gradients(graph):
    features = torch.zeros(DEPTHS, RANK, WIDTH, requires_grad=True)
    stream = coordinator(0.5, None)
    stream(features, graph).sum().backward()
    assert features.grad.isfinite().all() and stream.theta.grad.isfinite().all()
