"""Ideas of the search that the package does not have, made of parts that take the place of its own.

An idea is an option of a method, `x_...` by name: `structlora:x_sign=true`, `gates:x_warm_noise=0.5`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from structlora_trl import Runtime, StructLoRAConfig
from structlora_trl.core.coordinator import GCN
from structlora_trl.core.filters import InformationBottleneck
from structlora_trl.core.gates import LogisticNoise
from structlora_trl.core.graph import DepthGraph
from structlora_trl.core.mapping import Parts
from structlora_trl.core.nodes import Kind, discover, split_depth


@dataclass(frozen=True)
class Idea:
    """One idea.

    Args:
        parts (`dict`): fields of `Parts` that it replaces.
        bind (`Callable`, *optional*): (runtime, the option's value, steps of the run) -> None, once attached.
    """

    parts: dict = field(default_factory=dict)
    bind: Callable[[Runtime, object, int], None] | None = None


def parts_of(ideas: dict, config: StructLoRAConfig) -> Parts:
    """What to attach with.

    Args:
        ideas (`dict`): name -> value.
        config (`StructLoRAConfig`): the method's other options.

    Raises:
        SystemExit: two ideas replace the same part, or one replaces a part that the method does not have.
    """
    found: dict = {}
    for name in ideas:
        for part, replacement in IDEAS[name].parts.items():
            if part in found:
                raise SystemExit(f"{' and '.join(ideas)} both replace the {part}: try them one at a time")
            if part in _REPLACED and getattr(config, part) != _REPLACED[part]:
                raise SystemExit(f"{name} is an idea for {part}={_REPLACED[part]}, not for {getattr(config, part)}")
            found[part] = replacement
    return Parts(**found)


def bind(ideas: dict, runtime: Runtime, steps: int) -> None:
    """Tell the parts of an attached runtime what they could not know before."""
    for name, value in ideas.items():
        if IDEAS[name].bind is not None:
            IDEAS[name].bind(runtime, value, steps)


# Gates


class BlendedGates(InformationBottleneck):
    """Gates' probabilities, giving way to sampled gates or the other way round."""

    share_sampled: Callable[[], float]

    def gates(self, A: Tensor, B: Tensor, noise: Tensor | None) -> Tensor:
        still = self.gates_of(self.logits, None)
        if noise is None:
            return still
        return still + min(1.0, self.share_sampled()) * (self.gates_of(self.logits, noise) - still)


def _fade_noise(runtime: Runtime, share: float, steps: int) -> None:
    """Sampled gates give way to their probabilities over the last `share` of the run."""
    for m in runtime.maps:
        m.filter.share_sampled = lambda: (steps - runtime.step) / (share * steps)


def _warm_noise(runtime: Runtime, share: float, steps: int) -> None:
    """Gates' probabilities give way to sampled gates over the first `share` of the run."""
    for m in runtime.maps:
        m.filter.share_sampled = lambda: runtime.step / (share * steps)


class SmoothedGates(InformationBottleneck):
    """Gates of logits averaged over each depth and its neighbours in the graph."""

    graph: DepthGraph

    def gates(self, A: Tensor, B: Tensor, noise: Tensor | None) -> Tensor:
        joined = self.graph.edges.float().fill_diagonal_(1.0)
        return self.gates_of((joined / joined.sum(1, keepdim=True)) @ self.logits, noise)


def _follow_graphs(runtime: Runtime, value: bool, steps: int) -> None:
    for m in runtime.maps:
        m.filter.graph = m.graph


class GatesOfAllKinds(InformationBottleneck):
    """All kinds of a depth are gated by the mean of their logits."""

    others: list[InformationBottleneck]

    def gates(self, A: Tensor, B: Tensor, noise: Tensor | None) -> Tensor:
        shared = torch.stack([self.logits, *(other.logits.detach() for other in self.others)]).mean(0)
        return self.gates_of(shared, noise)


def _introduce_filters(runtime: Runtime, value: bool, steps: int) -> None:
    for m in runtime.maps:
        m.filter.others = [other.filter for other in runtime.maps if other is not m]


class NoiseOfAllDepths(LogisticNoise):
    """One draw for all depths of a kind."""

    def draw(self, step: int, shapes: list[tuple[int, ...]]) -> list[Tensor | None]:
        return [noise[:1].expand_as(noise) for noise in super().draw(step, shapes)]


# Coordinators


class NormPreserving(GCN):
    """Message passing turns features and leaves their norm at each depth: it cannot act as a larger learning rate."""

    def forward(self, features: Tensor, graph: DepthGraph) -> Tensor:
        mixed = features + super().forward(features, graph)
        before, after = ((x.square().sum((1, 2), keepdim=True) + 1e-12).sqrt() for x in (features, mixed))
        return mixed * (before / after) - features


class Diagonal(GCN):
    """Directions are passed on to the same direction of other depths alone."""

    def aggregate(self, features: Tensor, graph: DepthGraph, layer: int, theta: Tensor) -> Tensor:
        return super().aggregate(features, graph, layer, theta * torch.eye(len(theta)))


class Signed(GCN):
    """Edges carry the sign of the cosine of the features they join: what neighbours agree on up to its sign adds up."""

    def aggregate(self, features: Tensor, graph: DepthGraph, layer: int, theta: Tensor) -> Tensor:
        unit = normalize(features.detach().flatten(1), dim=1)
        signs = torch.where(unit @ unit.T < 0, -1.0, 1.0)
        mixed = (graph.propagate(torch.eye(len(signs))[:, None])[:, 0] * signs) @ features.flatten(1)
        return theta.T @ mixed.view_as(features)


def _start_theta(runtime: Runtime, value: float, steps: int) -> None:
    """Θ from a multiple of the identity. Harmless to outputs where the features start at zero (fresh readers)."""
    for m in runtime.maps:
        for coordinator in m.coordinators.values():
            coordinator.theta.data += value * torch.eye(coordinator.theta.shape[-1])


# Kinds


def joined_kinds(model: nn.Module, adapter_name: str) -> list[Kind]:
    """Kinds of equal shapes as one kind, with one A₀ and one Θ."""
    shapes = defaultdict(list)
    for kind in discover(model, adapter_name):
        shapes[tuple(kind.shape)].append(kind)
    return [
        Kind(
            "+".join(kind.name for kind in alike),
            *([x for kind in alike for x in getattr(kind, part)] for part in ("modules", "A", "B")),
        )
        for alike in shapes.values()
    ]


def kinds_of_one_A(model: nn.Module, adapter_name: str) -> list[Kind]:
    """Kinds whose depths start from one A₀, also where nothing compares them."""
    kinds = discover(model, adapter_name)
    for kind in kinds:
        for A in kind.A[1:]:
            A.data.copy_(kind.A[0].data)
    return kinds


def graph_of_joined(kind: Kind, config: StructLoRAConfig) -> DepthGraph:
    """Edges between neighbours in depth of what was one kind before, and between modules of one depth."""
    places = [split_depth(module) for module in kind.modules]
    edges = [
        [
            (one == other and abs(depth[0] - theirs[0]) == 1) or (one != other and depth == theirs)
            for other, theirs in places
        ]
        for one, depth in places
    ]
    semantic = (config.semantic_top_k, config.semantic_threshold, config.semantic_decay)
    return DepthGraph(torch.tensor(edges).to(kind.device), config.edges != "adjacency", *semantic)


IDEAS = {
    "x_diagonal": Idea({"coordinator": Diagonal}),
    "x_join_kinds": Idea({"discover": joined_kinds, "graph": graph_of_joined}),
    "x_one_A": Idea({"discover": kinds_of_one_A}),
    "x_sign": Idea({"coordinator": Signed}),
    "x_smooth_gates": Idea({"filter": SmoothedGates}, _follow_graphs),
    "x_normalise": Idea({"coordinator": NormPreserving}),
    "x_theta": Idea(bind=_start_theta),
    "x_fade_noise": Idea({"filter": BlendedGates}, _fade_noise),
    "x_warm_noise": Idea({"filter": BlendedGates}, _warm_noise),
    "x_share_kinds": Idea({"filter": GatesOfAllKinds}, _introduce_filters),
    "x_share_noise": Idea({"noise": NoiseOfAllDepths}),
}
# What a replaced part stands in for, where the configuration has a choice of parts.
_REPLACED = {"coordinator": "gcn", "filter": "ib"}
