"""Gates, graph, coordinator, map: what must hold for any input (property tests) and the figures that can be told by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from structlora_trl import StructLoRAConfig, StructLoRAError
from structlora_trl.core.coordinator import ACTIVATIONS, COORDINATORS
from structlora_trl.core.diagnostics import drift_energy, effective_rank
from structlora_trl.core.filters import InformationBottleneck, TopKFilter
from structlora_trl.core.gates import (
    expected_gate,
    gate_entropy,
    kl_gradient,
    kl_to_prior,
    logistic_noise,
    logit,
    sample_gates,
    top_k_mask,
)
from structlora_trl.core.graph import DepthGraph, adjacency_edges, normalize_edges, semantic_edges
from structlora_trl.core.mapping import Factors, KindMap
from structlora_trl.core.nodes import Kind
from tests.support.reference import reference_expected_gate, reference_weights

settings.register_profile("tests", deadline=None, max_examples=60)
settings.load_profile("tests")

depths = st.integers(2, 9)
probabilities = st.floats(0.01, 0.99)
seeds = st.integers(0, 2**31 - 1)


def floats(*shape):
    elements = st.floats(-8, 8, width=32)
    return hnp.arrays("float32", shape, elements=elements).map(torch.from_numpy)


@st.composite
def graphs(draw):
    count = draw(depths)
    upper = draw(hnp.arrays(bool, (count, count))).copy()
    edges = torch.from_numpy(upper).triu(1)
    return edges | edges.T


@given(floats(5), probabilities)
def test_kl_is_never_negative_and_its_gradient_is_the_derivative(logits, prior):
    logits = logits.double().requires_grad_()
    kl = kl_to_prior(logits, prior)
    assert (kl >= -1e-12).all()
    (derivative,) = torch.autograd.grad(kl.sum(), logits)
    torch.testing.assert_close(kl_gradient(logits.detach(), prior), derivative, atol=1e-9, rtol=1e-6)


@given(probabilities)
def test_kl_is_zero_at_the_prior_alone(prior):
    at = torch.tensor([logit(prior)], dtype=torch.float64)
    assert kl_to_prior(at, prior).item() == pytest.approx(0, abs=1e-12)
    assert (kl_to_prior(torch.cat([at - 0.5, at + 0.5]), prior) > 0).all()


@given(st.floats(-6, 6))
def test_entropy_of_a_gate(value):
    p = 1 / (1 + math.exp(-value))
    expected = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert gate_entropy(torch.tensor(value, dtype=torch.float64)).item() == pytest.approx(expected, abs=1e-9)


def test_noise_is_logistic_and_told_by_seed_and_step():
    noise = logistic_noise(200_000, seed=3, step=7)
    assert torch.equal(noise, logistic_noise(200_000, 3, 7))
    assert not torch.equal(noise, logistic_noise(200_000, 3, 8))
    assert not torch.equal(noise, logistic_noise(200_000, 4, 7))
    assert noise.isfinite().all()
    assert noise.mean().abs() < 0.02
    assert noise.var().item() == pytest.approx(math.pi**2 / 3, rel=0.02)
    # P(gate open) = sigmoid(φ), whatever the temperature
    open_share = (sample_gates(torch.tensor(1.0), noise, 0.3) > 0.5).float().mean().item()
    assert open_share == pytest.approx(1 / (1 + math.exp(-1)), abs=0.005)


@pytest.mark.parametrize("temperature, tolerance", [(0.05, 1e-3), (0.3, 1e-4), (1.0, 1e-4)])
@pytest.mark.parametrize("hard", [False, True])
def test_expected_gate_is_the_mean_of_samples(temperature, tolerance, hard):
    logits = torch.linspace(-6, 6, 13, dtype=torch.float64)
    expected = expected_gate(logits, temperature, hard)
    if not hard:
        torch.testing.assert_close(expected, reference_expected_gate(logits, temperature), atol=tolerance, rtol=0)
    noise = logistic_noise(400_000, seed=1, step=2).double()
    sampled = torch.stack([sample_gates(one, noise, temperature, hard).mean() for one in logits])
    torch.testing.assert_close(sampled, expected, atol=5e-3, rtol=0)  # three standard errors are below 0.0024


@given(floats(3, 4), seeds)
def test_hard_gates_are_binary_with_the_soft_gradient(logits, seed):
    noise = logistic_noise(12, seed, 0).view(3, 4)
    gradients = []
    for hard in (False, True):
        leaf = logits.clone().requires_grad_()
        gates = sample_gates(leaf, noise, 0.5, hard)
        gradients.append(torch.autograd.grad(gates.sum(), leaf)[0])
    assert set(gates.round(decimals=5).tolist()[0]) <= {0.0, 1.0}
    torch.testing.assert_close(*gradients)


def test_top_k_mask_keeps_the_largest_directions():
    A, B = torch.ones(2, 3, 4), torch.tensor([[[1.0, 3.0, 2.0]], [[5.0, 0.0, 4.0]]])
    assert top_k_mask(A, B, keep=2).tolist() == [[0, 1, 1], [1, 0, 1]]


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
    edges = semantic_edges(features, top_k=2, threshold=0.5, exclude=adjacency_edges(5))
    assert edges.nonzero().tolist() == [[0, 2], [2, 0]]
    assert not semantic_edges(features, 2, 0.5, exclude=torch.ones(5, 5, dtype=torch.bool)).any()


def graph_over(depth_count, **options):
    nodes = [nn.Parameter(torch.zeros(1, 1)) for _ in range(depth_count)]
    kind = Kind("layers.*.q_proj", [f"layers.{i}.q_proj" for i in range(depth_count)], nodes, nodes)
    return DepthGraph.over_depth(kind, StructLoRAConfig(**options))


@pytest.mark.parametrize("edges, adjacent, semantic", [("hybrid", 2, 1), ("adjacency", 2, 0), ("similarity", 0, 1)])
def test_edge_sets(edges, adjacent, semantic):
    graph = graph_over(3, edges=edges, semantic_top_k=1, semantic_threshold=0.9)
    if graph.follows_gradients:
        graph.observe(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]))
    graph.rebuild()
    assert graph.semantic_edge_count == semantic
    assert int(graph.edges.sum()) // 2 == adjacent + semantic


def mixture_graph(experts, depths, **options):
    nodes = [nn.Parameter(torch.zeros(1, 1)) for _ in range(experts * depths)]
    names = [f"layers.{i}.experts.{j}.w1" for i in range(depths) for j in range(experts)]
    return DepthGraph.over_depth(
        Kind("layers.*.experts.*.w1", names, nodes, nodes, per_depth=experts), StructLoRAConfig(**options)
    )


@pytest.mark.parametrize("edges", ["hybrid", "adjacency", "similarity"])
def test_experts_of_a_layer_are_joined_by_one_edge_shared_out(edges):
    """Beside the edges over depth of each, as the whole matrix of all nodes has it."""
    graph = mixture_graph(5, 3, edges=edges, semantic_threshold=0.0)
    if edges != "adjacency":
        graph.observe(torch.randn(5, 3, 20, generator=torch.Generator().manual_seed(0)))
        graph.rebuild()
        assert graph.semantic_edge_count > 0
    weights = reference_weights(graph.edges, edges != "similarity")
    scale = weights.sum(1).rsqrt()
    features = torch.randn(5, 3, 2, 4)
    whole = (scale[:, None] * weights * scale) @ features.flatten(0, 1).flatten(1)
    torch.testing.assert_close(graph.propagate(features), whole.view_as(features))
    # Whatever the number of experts, what comes from them weighs as much as one neighbour.
    assert (weights.sum(1) - graph.edges.sum(-1).flatten() - 1 == (edges != "similarity")).all()


@pytest.mark.parametrize("name", COORDINATORS)
def test_coordinator_commutes_with_permutations_of_experts(name):
    features, order = torch.randn(4, 3, 2, 5), torch.tensor([2, 0, 3, 1])
    coordinator, graph = build_coordinator(name, 2, 2, "tanh", 0), mixture_graph(4, 3)
    with torch.no_grad():
        added = coordinator(features, graph)
        torch.testing.assert_close(coordinator(features[order], graph), added[order])
        changed = features.clone()
        changed[1] += 1
        moved = (coordinator(changed, graph) - added).abs().amax((1, 2, 3))
        assert (moved > 1e-3).all()  # each hears each


def test_running_mean_decays():
    graph = graph_over(2, semantic_decay=0.75)
    graph.observe(torch.tensor([[1.0], [2.0]]))
    graph.observe(torch.tensor([[5.0], [2.0]]))
    assert graph.features.tolist() == [[2.0], [2.0]]


def test_deep_graphs_multiply_the_same():
    """Beyond a depth the product is sparse; values and gradients are those of the dense one."""
    graph = graph_over(200, semantic_threshold=0.0)
    features = torch.randn(200, 3, 5, requires_grad=True)
    graph.observe(features.detach().flatten(1))
    graph.rebuild()
    assert graph._propagation.is_sparse and graph.semantic_edge_count > 0
    weight = torch.randn(200, 3, 5)
    dense = (normalize_edges(graph.edges) @ features.flatten(1)).view_as(features)
    torch.testing.assert_close(graph.propagate(features), dense)
    gradients = [torch.autograd.grad((out * weight).sum(), features)[0] for out in (dense, graph.propagate(features))]
    torch.testing.assert_close(*gradients)


def build_coordinator(name, rank, layers, activation, seed):
    coordinator = COORDINATORS[name](rank, layers, activation)
    generator = torch.Generator().manual_seed(seed)
    for parameter in coordinator.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return coordinator


def graph_of(edges):
    graph = graph_over(len(edges), edges="similarity")
    graph.load_state_dict({"semantic": edges})
    return graph


@pytest.mark.parametrize("name", COORDINATORS)
@given(edges=graphs(), seed=seeds, layers=st.integers(1, 3), activation=st.sampled_from(sorted(ACTIVATIONS)))
def test_coordinator_commutes_with_permutations_of_depth(name, edges, seed, layers, activation):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(edges), 3, 5, generator=generator)
    order = torch.randperm(len(edges), generator=generator)
    coordinator = build_coordinator(name, 3, layers, activation, seed)
    with torch.no_grad():
        permuted = coordinator(features[order], graph_of(edges[order][:, order]))
        torch.testing.assert_close(permuted, coordinator(features, graph_of(edges))[order], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", COORDINATORS)
def test_new_coordinator_changes_nothing_and_can_learn(name):
    for activation in ACTIVATIONS:
        coordinator = COORDINATORS[name](3, 1, activation)
        added = coordinator(torch.randn(4, 3, 5), graph_of(adjacency_edges(4)))
        assert not added.any()
        (gradient,) = torch.autograd.grad((added * torch.randn(4, 3, 5)).sum(), coordinator.theta)
        assert gradient.abs().sum() > 0, activation


def test_gat_starts_as_the_mean_over_neighbours():
    coordinator = COORDINATORS["gat"](2, 1, "identity")
    coordinator.theta.data[0] = torch.eye(2)
    experts = torch.randn(3, 2, 2, 4)
    near = [experts[0, 0], experts[0, 1], experts[1:, 0].mean(0)]
    torch.testing.assert_close(coordinator(experts, mixture_graph(3, 2))[0, 0], torch.stack(near).mean(0))
    features = torch.randn(3, 2, 4)
    added = coordinator(features, graph_of(adjacency_edges(3)))
    torch.testing.assert_close(added[0], features[:2].mean(0))
    torch.testing.assert_close(added[1], features.mean(0))


@pytest.mark.parametrize("name", COORDINATORS)
def test_gradients_at_zero_features_are_finite(name):
    """Where every fresh run starts: A - A0 = 0."""
    coordinator = build_coordinator(name, 3, 2, "tanh", 0)
    features = torch.zeros(4, 3, 5, requires_grad=True)
    added = coordinator(features, graph_of(adjacency_edges(4)))
    for gradient in torch.autograd.grad(added.sum() * 1e6, [features, *coordinator.parameters()]):
        assert gradient.isfinite().all()


def kind_map(depth_count=4, rank=3, **options):
    def make(*shape):
        return [nn.Parameter(torch.randn(shape)) for _ in range(depth_count)]

    kind = Kind("layers.*.q_proj", [f"layers.{i}.q_proj" for i in range(depth_count)], make(rank, 6), make(5, rank))
    m = KindMap(kind, StructLoRAConfig(**options), origin_A=torch.randn(depth_count, rank, 6))
    with torch.no_grad():
        for parameter in m.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return m, Factors(torch.stack(list(kind.A)).detach(), torch.stack(list(kind.B)).detach())


@given(seed=seeds, a=st.floats(-3, 3), b=st.floats(-3, 3), coordinator=st.sampled_from(["gcn", "gat", "none"]))
def test_pullback_is_linear_in_the_gradient(seed, a, b, coordinator):
    torch.manual_seed(seed)
    m, latent = kind_map(coordinator=coordinator, side="auto" if coordinator == "none" else "both")
    noise = torch.randn(4, 3)
    first, second = (Factors(torch.randn(4, 3, 6), torch.randn(4, 5, 3)) for _ in range(2))
    mixed = Factors(*(a * x + b * y for x, y in zip(first, second, strict=True)))

    def flat(gradient):
        factors, own = m.pullback(latent, gradient, noise)
        return torch.cat([t.flatten() for t in (*factors, *own.values())])

    torch.testing.assert_close(flat(mixed), a * flat(first) + b * flat(second), atol=1e-3, rtol=1e-3)


def test_loss_scale_is_taken_out_of_the_maps_own_gradients_alone():
    m, latent = kind_map()
    noise, gradient = torch.randn(4, 3), Factors(torch.randn(4, 3, 6), torch.randn(4, 5, 3))
    factors, own = m.pullback(latent, gradient, noise)
    scaled_factors, scaled_own = m.pullback(latent, Factors(*(1024 * g for g in gradient)), noise, scale=1024.0)
    for plain, scaled in zip(factors, scaled_factors, strict=True):
        torch.testing.assert_close(1024 * plain, scaled, rtol=1e-4, atol=1e-2)
    for name in own:
        torch.testing.assert_close(own[name], scaled_own[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [False, True])
def test_objective_of_the_gates(share):
    """φ's gradient is γ times the task's, plus λβ times that of the KL averaged over all gates of the model."""
    m, _ = kind_map(share_gates=share, label_weight=0.25, prior=0.3)
    task = {"filter.logits": torch.randn_like(m.filter.logits)}
    total_gates = 10 * m.gate_count
    found = m.objective_gradients(task, kl_scale=0.7 / total_gates)["filter.logits"]
    logits = m.filter.logits.detach().clone().requires_grad_()
    kl = kl_to_prior(logits.expand(4, -1), 0.3).sum() / total_gates
    torch.testing.assert_close(found, 0.25 * task["filter.logits"] + 0.7 * torch.autograd.grad(kl, logits)[0])


def test_filters_at_evaluation():
    for name, expected in {"none": None, "random": None}.items():
        m, latent = kind_map(filter=name)
        assert m.filter.gates(*latent, None) is expected
    m, latent = kind_map(filter="topk_norm", gate_init=0.34)
    assert m.filter.gates(*latent, None).sum(1).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["ib", "random", "topk_norm"])
def test_what_gates_are_divided_by_is_state(name):
    """Another `gate_init` on resume changes no weight, at evaluation or in training."""
    m, latent = kind_map(filter=name)
    other, _ = kind_map(filter=name, gate_init=0.4)
    other.restore(latent, m.state_dict(), m.graph.state_dict())
    for noise in (None, torch.randn(4, 3)):
        for ours, theirs in zip(m(latent, noise), other(latent, noise), strict=True):
            assert torch.equal(ours, theirs)


def test_random_filter_keeps_the_asked_share_on_average():
    m, latent = kind_map(depth_count=2000, rank=8, filter="random", gate_init=0.6, coordinator="none")
    gates = m.filter.gates(*latent, logistic_noise(16000, 0, 0).view(2000, 8))
    assert gates.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert gates.mean().item() == pytest.approx(1, abs=0.03)


def test_closed_directions_of_top_k_still_learn():
    m, latent = kind_map(filter="topk_norm", gate_init=0.34, coordinator="none")
    gradient = Factors(torch.randn(4, 3, 6), torch.randn(4, 5, 3))
    pulled, _ = m.pullback(latent, gradient, None)
    torch.testing.assert_close(pulled.B, gradient.B)


@given(seed=seeds)
def test_effective_rank_is_that_of_the_product(seed):
    torch.manual_seed(seed)
    A, B = torch.randn(3, 4, 7), torch.randn(3, 6, 4)
    singular = torch.linalg.svdvals((B @ A).double())
    share = singular / singular.sum(1, keepdim=True)
    expected = torch.exp(-(share * share.clamp(min=1e-30).log()).sum(1))
    torch.testing.assert_close(effective_rank(A, B).double(), expected, atol=1e-2, rtol=1e-2)
    assert effective_rank(A, torch.zeros(3, 6, 4)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_effective_rank_of_diverged_factors_is_nan_and_no_error(value):
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 4, 8, generator=generator), torch.randn(3, 6, 4, generator=generator)
    expected = effective_rank(A, B)
    B[1, 0, 0] = value
    found = effective_rank(A, B)
    assert found[1].isnan()
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])


def test_drift_energy():
    assert drift_energy(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0]])) == 26


@pytest.mark.parametrize(
    "share, rank, kept", [(0.29, 100, 29), (0.58, 50, 29), (0.5, 4, 2), (0.34, 4, 1), (0.01, 4, 1)]
)
def test_top_k_keeps_that_share(share, rank, kept):
    config = StructLoRAConfig(filter="topk_norm", gate_init=share)
    assert int(TopKFilter((2, rank), config, torch.device("cpu")).keep) == kept


def test_gates_that_underflow_are_refused():
    config = StructLoRAConfig(gate_init=1e-4, temperature=0.01)
    with pytest.raises(StructLoRAError, match="gates that are 0 in fp32.*raise `temperature` or `gate_init`"):
        InformationBottleneck((2, 4), config, torch.device("cpu"))
