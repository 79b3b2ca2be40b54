"""Ideas of the search that the package does not have, made of parts that take the place of its own.

An idea is an option of a method, `x_...` by name: `structlora:x_sign=true`, `gates:x_warm_noise=0.5`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from structlora_trl.core.width import WHOLE, Width
from torch import Tensor, nn
from torch.nn.functional import normalize

from structlora_trl import Runtime, StructLoRAConfig
from structlora_trl.core.coordinator import GCN
from structlora_trl.core.filters import InformationBottleneck
from structlora_trl.core.gates import LogisticNoise
from structlora_trl.core.graph import DepthGraph, semantic_edges
from structlora_trl.core.kinds import Kind, discover, split_depth
from structlora_trl.core.mapping import Parts, compared_sides


class Length(NamedTuple):
    """Optimizer steps of a run, and of one pass over its data."""

    steps: int
    steps_per_pass: int


@dataclass(frozen=True)
class Idea:
    """One idea.

    Args:
        parts (`dict`): fields of `Parts` that it replaces.
        bind (`Callable`, *optional*): (runtime, the option's value, length of the run) -> None, once attached.
    """

    parts: dict = field(default_factory=dict)
    bind: Callable[[Runtime, object, Length], None] | None = None


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


def bind(ideas: dict, runtime: Runtime, length: Length) -> None:
    """Tell the parts of an attached runtime what they could not know before."""
    for name, value in ideas.items():
        if IDEAS[name].bind is not None:
            IDEAS[name].bind(runtime, value, length)


# Gates


class BlendedGates(InformationBottleneck):
    """Gates' probabilities, giving way to sampled gates or the other way round."""

    share_sampled: Callable[[], float]

    def gates(self, A: Tensor, B: Tensor, noise: Tensor | None) -> Tensor:
        still = self.gates_of(self.logits, None)
        if noise is None:
            return still
        return still + min(1.0, self.share_sampled()) * (self.gates_of(self.logits, noise) - still)


def _fade_noise(runtime: Runtime, share: float, length: Length) -> None:
    """Sampled gates give way to their probabilities over the last `share` of the run."""
    for m in runtime.maps:
        m.filter.share_sampled = lambda: (length.steps - runtime.step) / (share * length.steps)


def _warm_noise(runtime: Runtime, share: float, length: Length) -> None:
    """Gates' probabilities give way to sampled gates over the first `share` of the run."""
    for m in runtime.maps:
        m.filter.share_sampled = lambda: runtime.step / (share * length.steps)


def _still_at_first(runtime: Runtime, passes: float, length: Length) -> None:
    """No noise during the first `passes` over the data (True: one)."""
    for m in runtime.maps:
        m.filter.share_sampled = lambda: float(runtime.step >= passes * length.steps_per_pass)


def _share_noise_out(runtime: Runtime, kinds: float, length: Length) -> None:
    """Noise of as much variance in all as `kinds` gated kinds have together (True: two, as q and v), however many there are."""
    _scale_noise(runtime, ((2 if kinds is True else kinds) / len(runtime.maps)) ** 0.5)


def _bound_noise(runtime: Runtime, modules: float, length: Length) -> None:
    """Noise of no more variance in all than that many gated modules have together (True: 24, q and v of 12 layers)."""
    count = sum(m.kind.depth_count * m.kind.experts for m in runtime.maps)
    _scale_noise(runtime, ((24 if modules is True else modules) / count) ** 0.5)


def _scale_noise(runtime: Runtime, share: float) -> None:
    for m in runtime.maps:
        m.filter.share_sampled = lambda: share


class SignalToNoise(InformationBottleneck):
    """Logits in closed form in the place of learned ones: σ(φ) = s/(s + c), as a Wiener filter or a Gaussian information
    bottleneck weighs a channel, with s the signal-to-noise ratio of the direction's gradient.

    s = ‖mean‖²/variance of the gradient of the direction's column of B, over a running mean of steps, less what pure noise
    would show. c is one figure per kind, which keeps the mean logit where it started: the filter chooses between directions,
    and is neither a larger nor a smaller learning rate.
    """

    decay = 0.95
    patience = 8  # steps before the ratio is used
    limit = 2.0  # |φ − φ₀| at most
    kind: Kind  # bound

    def __init__(self, shape: tuple[int, ...], config: StructLoRAConfig, device: torch.device):
        super().__init__(shape, config, device)
        self.start = self.logits.detach().clone()
        self.mean, self.power, self.count = None, None, 0

    @torch.no_grad()
    def objective_gradient(self, task: Tensor, kl_scale: float) -> Tensor:
        """Called once in a step, while gradients of the effective factors still stand in the parameters."""
        gradient = torch.stack([B.grad for B in self.kind.B])  # (L, d, r)
        power = gradient.square().sum(1)  # (L, r)
        if self.mean is None:
            self.mean, self.power = torch.zeros_like(gradient), torch.zeros_like(power)
        self.mean.lerp_(gradient, 1 - self.decay)
        self.power.lerp_(power, 1 - self.decay)
        self.count += 1
        if self.count >= self.patience:
            ratio = self.log_ratio()
            self.logits.copy_(self.start + (ratio - ratio.mean()).clamp(-self.limit, self.limit))
        return torch.zeros_like(task)  # nothing else moves them

    def log_ratio(self) -> Tensor:
        """log s, (L, r), from the running means."""
        past = self.decay**self.count
        share = self.mean.square().sum(1) / (1 - past) / self.power.clamp(min=1e-30)  # ‖mean‖² / mean ‖g‖²
        chance = (1 - self.decay) / (1 + self.decay) * (1 + past) / (1 - past)  # of independent gradients of mean zero
        return ((share - chance).clamp(min=0.01) / (1 - share).clamp(min=0.01)).log()


def _introduce_kinds(runtime: Runtime, value: bool, length: Length) -> None:
    for m in runtime.maps:
        m.filter.kind = m.kind


class StillSignalToNoise(SignalToNoise):
    """The same without noise in training: the filter alone."""

    def gates(self, A: Tensor, B: Tensor, noise: Tensor | None) -> Tensor:
        return self.gates_of(self.logits, None)


class SmoothedGates(InformationBottleneck):
    """Gates of logits averaged over each depth and its neighbours in the graph."""

    graph: DepthGraph

    def gates(self, A: Tensor, B: Tensor, noise: Tensor | None) -> Tensor:
        joined = self.graph.edges.float().fill_diagonal_(1.0)
        return self.gates_of((joined / joined.sum(1, keepdim=True)) @ self.logits, noise)


def _follow_graphs(runtime: Runtime, value: bool, length: Length) -> None:
    for m in runtime.maps:
        m.filter.graph = m.graph


class GatesOfAllKinds(InformationBottleneck):
    """All kinds of a depth are gated by the mean of their logits."""

    others: list[InformationBottleneck]

    def gates(self, A: Tensor, B: Tensor, noise: Tensor | None) -> Tensor:
        shared = torch.stack([self.logits, *(other.logits.detach() for other in self.others)]).mean(0)
        return self.gates_of(shared, noise)


def _introduce_filters(runtime: Runtime, value: bool, length: Length) -> None:
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


def _start_theta(runtime: Runtime, value: float, length: Length) -> None:
    """Θ from a multiple of the identity. Harmless to outputs where the features start at zero (fresh readers)."""
    for m in runtime.maps:
        for coordinator in m.coordinators.values():
            coordinator.theta.data += value * torch.eye(coordinator.theta.shape[-1])


class Stream(GCN):
    """Messages over the residual stream: directions attend to what other nodes' directions have in common with them.

    Node features are what a module writes to the stream (B̃ᵀ) or has learned to read from it (A − A₀), (L, r, n). A message is
    h_l M_j with M_j = h_jᵀ h_j / ‖h_jᵀ h_j‖, the part of h_l that lies where node j writes: rows of h_j weighed by the inner
    products h_l h_jᵀ (r x r), the one thing that needs the width. M_j has unit norm, so that no message is larger than the
    features. Rotating the rank axis of any node leaves all others as they are and rotates that node's own: nothing depends on
    a basis of the rank axis. Hence Θ holds scalars, one for each way to be joined: to itself, to the depth before, to the
    depth after, by a semantic edge, to another kind at the same depth, and to one a depth away. Mixed features keep their
    norm: no larger learning rate.
    """

    SELF, BEFORE, AFTER, SEMANTIC, SAME_DEPTH, NEAR_DEPTH = range(6)
    rescales = True
    floor = 1e-12

    def __init__(self, rank: int, layers: int, activation: str):
        super().__init__(rank, layers, activation)
        self.theta = nn.Parameter(torch.zeros(layers, 6))
        self.others: Callable[[], Tensor] | None = None  # features of nodes of other kinds, (P, r, n); bound
        self.joins_others: Tensor | None = None  # (2, L, P) bool, at the same depth and a depth away

    def forward(self, features: Tensor, graph: DepthGraph) -> Tensor:
        others = None if self.others is None else self.others()
        mixed = features
        for theta in self.theta:
            mixed = mixed + self._messages(mixed, others, self._weights(theta, graph))
            if self.rescales:
                before, after = (
                    (x.square().sum((1, 2), keepdim=True) + self.floor**2).sqrt() for x in (features, mixed)
                )
                mixed = mixed * (before / after)
        return mixed - features

    def _messages(self, features: Tensor, others: Tensor | None, weights: Tensor) -> Tensor:
        nodes = features if others is None else torch.cat([features, others])
        count, rank, width = nodes.shape
        gram = nodes @ nodes.mT  # (P, r, r)
        scale = (gram.square().sum((1, 2)) + self.floor**2).rsqrt()
        flat = nodes.reshape(count * rank, width)
        shared = (features.reshape(-1, width) @ flat.T).view(len(features), rank, count, rank)
        shared = shared * (weights * scale)[:, None, :, None]
        return (shared.reshape(-1, count * rank) @ flat).view_as(features)

    def _weights(self, theta: Tensor, graph: DepthGraph) -> Tensor:
        """Θ over the edges, each sort shared out among a node's edges of that sort: (L, P)."""
        one = torch.eye(len(graph.fixed), device=theta.device)
        before, after = one.roll(1, 0), one.roll(-1, 0)
        before[0] = after[-1] = 0
        sorts = [one, before, after, graph.semantic.float()]
        weights = sum(t * _shared_out(sort) for t, sort in zip(theta[: self.SAME_DEPTH], sorts, strict=True))
        if self.others is None:
            return weights
        to_others = zip(theta[self.SAME_DEPTH :], self.joins_others, strict=True)
        other = sum(t * _shared_out(sort.float()) for t, sort in to_others)
        return torch.cat([weights, other], dim=1)


class StreamGraph(DepthGraph):
    """Semantic edges by a cosine that no basis of the rank axis enters: ⟨M, M'⟩ / ‖M‖‖M'‖ with M = gᵀ g (n x n), of
    running-mean gradients g (r, n)."""

    rank: int
    side: str

    @classmethod
    def over_depth(cls, kind: Kind, config: StructLoRAConfig) -> DepthGraph:
        graph = super().over_depth(kind, config)
        graph.rank, (graph.side,) = kind.rank, compared_sides(kind, config)
        return graph

    def rebuild(self, width: Width = WHOLE) -> None:
        if self.features is None:
            return
        g = normalize(self.features, dim=1)
        # As `side_gradients` flattens them: (r, k) of lora_A, (d, r) of lora_B.
        g = g.unflatten(1, (self.rank, -1)) if self.side == "A" else g.unflatten(1, (-1, self.rank)).mT
        product = width.sum(torch.einsum("arn,bsn->abrs", g, g)).square().sum((2, 3))
        norm = product.diagonal().sqrt()
        # A matrix of cosines is the Gram matrix of the rows of its square root.
        values, vectors = torch.linalg.eigh(product / (norm[:, None] * norm).clamp(min=1e-30))
        rows = vectors * values.clamp(min=0).sqrt()
        self.semantic = semantic_edges(rows, self.top_k, self.threshold, self.fixed)
        self._refresh()


def _shared_out(edges: Tensor) -> Tensor:
    return edges / edges.sum(1, keepdim=True).clamp(min=1)


def _start_stream(runtime: Runtime, value: float, length: Length) -> None:
    """Θ of neighbours from `value`; True is zero, where nothing is changed until it is learned."""
    start = 0.0 if value is True else value
    for m in runtime.maps:
        for coordinator in m.coordinators.values():
            coordinator.theta.data[:, [Stream.BEFORE, Stream.AFTER, Stream.SAME_DEPTH]] = start


def _join_streams(runtime: Runtime, value: float, length: Length) -> None:
    """Each map's nodes hear those of all other kinds that write the same stream, or read it.

    What other kinds write is a constant for a map, at its mean gates, so that the maps stay separate: one pullback each.
    """
    _start_stream(runtime, value, length)
    cache: dict = {}

    @torch.no_grad()
    def features() -> list[Tensor]:
        if cache.get("step") != runtime.step:
            latents = runtime.engine.read_latents()
            cache["found"] = [
                m.features(m._filtered(latent, None))[0] for m, latent in zip(runtime.maps, latents, strict=True)
            ]
            cache["step"] = runtime.step
        return cache["found"]

    shapes = [(m.sides, found.shape[-1]) for m, found in zip(runtime.maps, features(), strict=True)]
    depths = [torch.tensor([split_depth(name)[1][0] for name in m.kind.modules]) for m in runtime.maps]
    for i, m in enumerate(runtime.maps):
        peers = [j for j, shape in enumerate(shapes) if j != i and shape == shapes[i]]
        if not peers:
            continue
        (coordinator,) = m.coordinators.values()
        apart = (depths[i][:, None] - torch.cat([depths[j] for j in peers])[None]).abs().to(m.kind.device)
        coordinator.others = lambda peers=peers: torch.cat([features()[j] for j in peers])
        coordinator.joins_others = torch.stack([apart == 0, apart == 1])


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
    "x_second_pass": Idea({"filter": BlendedGates}, _still_at_first),
    "x_total_noise": Idea({"filter": BlendedGates}, _share_noise_out),
    "x_bounded_noise": Idea({"filter": BlendedGates}, _bound_noise),
    "x_snr": Idea({"filter": SignalToNoise}, _introduce_kinds),
    "x_snr_still": Idea({"filter": StillSignalToNoise}, _introduce_kinds),
    "x_stream": Idea({"coordinator": Stream, "graph": StreamGraph.over_depth}, _start_stream),
    "x_stream_all": Idea({"coordinator": Stream, "graph": StreamGraph.over_depth}, _join_streams),
}
# What a replaced part stands in for, where the configuration has a choice of parts.
_REPLACED = {"coordinator": "gcn", "filter": "ib"}
