"""Ideas of one's own, without touching the package: every part can be replaced by an argument."""

from __future__ import annotations

import torch

from structlora_trl import attach
from structlora_trl.core.coordinator import GCN
from structlora_trl.core.gates import Gate
from structlora_trl.core.graph import DepthGraph
from structlora_trl.core.kinds import discover
from structlora_trl.core.mapping import Parts
from tests.support.tiny import DATA, LAYERS, adamw, logits_of, loss_of, peft_model, train


class Bernoulli(Gate):
    """Directions are dropped, with a mean of one."""

    def sample(self, activations):
        return torch.bernoulli(torch.full_like(activations[:, :1], 0.5)) / 0.5


class Diagonal(GCN):
    """Directions are passed on to the same direction of other depths alone."""

    def aggregate(self, features, graph, layer, theta, kept):
        return super().aggregate(features, graph, layer, theta * torch.eye(len(theta)), kept)


def all_joined(kind, config):
    return DepthGraph(~torch.eye(kind.depth_count, dtype=torch.bool)[None], config, False)


def values_alone(model, adapter_name):
    return [kind for kind in discover(model, adapter_name) if kind.name.endswith("v_proj")]


def the_last(nats, keep):
    """Of all directions, the last ones."""
    return torch.arange(len(nats)) >= (1 - keep) * len(nats)


def test_every_part_can_be_replaced():
    model = peft_model()
    optimizer = adamw(model)
    before = logits_of(model, "llama")
    parts = Parts(values_alone, Bernoulli, all_joined, Diagonal, the_last)
    runtime = attach(model, optimizer, **DATA, parts=parts, keep=0.25, select_at=10)
    assert (logits_of(model, "llama") - before).abs().max() <= 1e-6
    seen = []
    layer = model.base_model.model.model.layers[0].self_attn.v_proj.lora_A["default"]
    layer.register_forward_hook(
        lambda module, inputs, output: seen.append(output / (inputs[0] @ module.weight.T))
    )
    loss_of(model, "llama", 0)
    assert {round(gate, 3) for gate in seen[0].flatten().tolist()} == {0.0, 2.0}
    train(model, "llama", optimizer, steps=10)
    (m,) = runtime.maps
    assert m.kind.name.endswith("v_proj")
    theta = m.coordinators["A"].theta[0]
    assert theta.diagonal().abs().min() > 0 and not (theta - torch.diag(theta.diagonal())).any()
    spread = m.graph.propagate(torch.eye(LAYERS)[:, None])
    torch.testing.assert_close(spread, torch.full_like(spread, 1 / LAYERS))
    assert m.kept.flatten().tolist() == [False] * 9 + [True] * 3
