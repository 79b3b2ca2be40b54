"""The coordinator over the residual stream, an idea of the suite: nothing at the start, and no basis of the rank axis in it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality import ideas, methods
from benchmarks.quality.ideas import Stream, StreamGraph
from structlora_trl import attach
from structlora_trl.core.graph import adjacency_edges
from tests.support.tiny import adamw, peft_model, train

DEPTHS, RANK, WIDTH = 5, 3, 16


def made(gradients: torch.Tensor, side: str) -> StreamGraph:
    """A graph that has seen (L, r, n), flattened as the map does: (r, k) of lora_A, (d, r) of lora_B."""
    graph = StreamGraph(adjacency_edges(DEPTHS), True, 2, 0.05, 0.9)
    graph.rank, graph.side = RANK, side
    graph.observe((gradients if side == "A" else gradients.mT).flatten(1))
    graph.rebuild()
    return graph


@pytest.fixture
def graph():
    return made(torch.randn(DEPTHS, RANK, WIDTH), "A")


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


@pytest.mark.parametrize("side", ["A", "B"])
def test_semantic_edges_do_not_depend_on_it_either(side):
    gradients = torch.randn(DEPTHS, RANK, WIDTH)
    gradients[4] = gradients[0] + 0.1 * gradients[4]
    one, turned = made(gradients, side), made(rotations(DEPTHS) @ gradients, side)
    assert one.semantic[0, 4] and torch.equal(one.semantic, turned.semantic)


@pytest.mark.parametrize("idea", ["x_stream", "x_stream_all"])
def test_graphs_know_their_side_and_are_rebuilt_in_training(idea):
    """Readers and writers of a model, for longer than semantic edges stand."""
    model = peft_model(targets=["q_proj", "k_proj", "o_proj", "down_proj"])
    optimizer = adamw(model)
    method = methods.find(f"structlora:{idea}=true,align_init=false,semantic_every=2")
    runtime = attach(model, optimizer, seed=0, parts=method.parts, **method.given)
    ideas.bind(method.ideas, runtime, ideas.Length(5, 1))
    sides = {m.kind.name.rsplit(".", 1)[-1]: m.graph.side for m in runtime.maps}
    assert sides == {"q_proj": "A", "k_proj": "A", "o_proj": "B", "down_proj": "B"}
    train(model, "llama", optimizer, steps=5)
    assert all(c.theta.any() for m in runtime.maps for c in m.coordinators.values())
    runtime.detach()


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
