"""Ideas of one's own, without touching the package: every part of the map can be replaced by an argument."""

from __future__ import annotations

import torch

from structlora_trl import attach
from structlora_trl.core.coordinator import GCN
from structlora_trl.core.filters import InformationBottleneck
from structlora_trl.core.gates import LogisticNoise
from structlora_trl.core.graph import DepthGraph
from structlora_trl.core.kinds import discover
from structlora_trl.core.mapping import Parts
from tests.support.tiny import LAYERS, adamw, evaluation_factors, logits_of, loss_of, peft_model, train


class MeanOverDepth(InformationBottleneck):
    """Gates of logits averaged over depth."""

    def gates(self, update, noise):
        return self.gates_of(self.logits.mean(0, keepdim=True), noise)


class OneDraw(LogisticNoise):
    """The same noise at every depth."""

    def draw(self, step, shapes):
        return [noise[:1].expand_as(noise) for noise in super().draw(step, shapes)]


class Diagonal(GCN):
    """Directions are passed on to the same direction of other depths alone."""

    def aggregate(self, features, graph, layer, theta):
        return super().aggregate(features, graph, layer, theta * torch.eye(len(theta)))


def all_joined(kind, config):
    return DepthGraph(~torch.eye(kind.depth_count, dtype=torch.bool)[None], config, False)


def values_alone(model, adapter_name):
    return [kind for kind in discover(model, adapter_name) if kind.name.endswith("v_proj")]


def test_every_part_can_be_replaced():
    model = peft_model()
    optimizer = adamw(model)
    before = logits_of(model, "llama")
    parts = Parts(values_alone, MeanOverDepth, all_joined, Diagonal, OneDraw)
    runtime = attach(model, optimizer, parts=parts)
    assert (logits_of(model, "llama") - before).abs().max() <= 1e-6
    train(model, "llama", optimizer, steps=3)
    (m,) = runtime.maps
    assert m.kind.name.endswith("v_proj")
    theta = m.coordinators["A"].theta[0]
    assert theta.diagonal().abs().min() > 0 and not (theta - torch.diag(theta.diagonal())).any()
    noise = runtime.noise.draw(runtime.step, [m.filter.shape])[0]
    gates = m.filter.gates(runtime.engine.read_latents()[0], noise)
    torch.testing.assert_close(gates, gates[:1].expand(LAYERS, -1))
    assert gates.std() > 0
    spread = m.graph.propagate(torch.eye(LAYERS)[:, None])
    torch.testing.assert_close(spread, torch.full_like(spread, 1 / LAYERS))


class GatesOfRows(InformationBottleneck):
    """Gates on the rows of lora_A in place of the columns of lora_B."""

    def forward(self, update, noise):
        return update._replace(A=update.A * self.gates(update, noise).unsqueeze(-1))


def test_noise_of_a_filter_of_ones_own_reaches_what_it_gates():
    """In every step, the weights that a forward computes with are those that the gradients are carried back through."""
    model = peft_model()
    optimizer = adamw(model)
    runtime = attach(model, optimizer, parts=Parts(filter=GatesOfRows), gate_init=0.6, coordinator="none")
    train(model, "llama", optimizer, steps=2)
    evaluation = [factors.A.clone() for factors in evaluation_factors(runtime)]
    loss_of(model, "llama", 2)
    for standing, quiet in zip(runtime.engine.read_working(), evaluation, strict=True):
        assert not torch.equal(standing.A, quiet)
