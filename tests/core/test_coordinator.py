"""Message passing: symmetries that it must have, where it starts, and that it can learn from there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from structlora_trl.core.coordinator import COORDINATORS
from structlora_trl.core.graph import adjacency_edges
from tests.support.core import build_coordinator, graph_of, graph_over, graphs, seeds


@pytest.mark.parametrize("name", COORDINATORS)
def test_coordinator_commutes_with_permutations_of_experts(name):
    features, order = torch.randn(4, 3, 2, 5), torch.tensor([2, 0, 3, 1])
    coordinator, graph = build_coordinator(name, 2, 2, 0), graph_over(3, experts=4)

    def added_to(experts):
        return graph.by_expert(coordinator(graph.by_node(experts), graph))

    with torch.no_grad():
        added = added_to(features)
        torch.testing.assert_close(added_to(features[order]), added[order])
        changed = features.clone()
        changed[1] += 1
        moved = (added_to(changed) - added).abs().amax((1, 2, 3))
        assert (moved > 1e-3).all()  # each hears each


@pytest.mark.parametrize("name", COORDINATORS)
@given(edges=graphs(), seed=seeds, layers=st.integers(1, 3))
def test_coordinator_commutes_with_permutations_of_depth(name, edges, seed, layers):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(edges), 3, 5, generator=generator)
    order = torch.randperm(len(edges), generator=generator)
    coordinator = build_coordinator(name, 3, layers, seed)
    with torch.no_grad():
        permuted = coordinator(features[order], graph_of(edges[order][:, order]))
        torch.testing.assert_close(
            permuted, coordinator(features, graph_of(edges))[order], atol=1e-4, rtol=1e-4
        )


def test_gat_starts_as_the_mean_over_neighbours():
    coordinator = COORDINATORS["gat"](2, 1)
    coordinator.theta.data[0] = torch.eye(2)
    experts = torch.randn(3, 2, 2, 4)
    near = [experts[0, 0], experts[0, 1], experts[1:, 0].mean(0)]
    graph = graph_over(2, experts=3)
    added = graph.by_expert(coordinator(graph.by_node(experts), graph))
    torch.testing.assert_close(added[0, 0], torch.stack(near).mean(0).tanh())
    features = torch.randn(3, 2, 4)
    added = coordinator(features, graph_of(adjacency_edges(3)))
    torch.testing.assert_close(added[0], features[:2].mean(0).tanh())
    torch.testing.assert_close(added[1], features.mean(0).tanh())
