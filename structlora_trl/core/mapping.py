"""The latent-to-effective map of one kind, and its pullback.

    latent (A, B)  --filters-->  (A, B̃ = B·diag(m)/m₀)  --message passing-->  effective (A', B')

The optimizer steps the latent factors; the model computes with the effective ones. All nodes of a kind go
through the map at once: A is (N, r, k), B is (N, d, r), and ΔW = s·B·A at each node. k and d are a batch to
the map: a slice of them is just a smaller factor.

Updates count from an origin: A₀ at attach, and B₀ = 0, except for initialisations that move part of the base
weights into the adapter (PiSSA and the like). There B₀ is B at attach and the gates act on B − B₀: to gate
the whole of B would switch the base model's own principal directions on and off. VeRA's λ_d starts at a
constant: its updates count from there, and the gates act on the whole of it, since ΔW starts at zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import StructLoRAConfig
from ..errors import StructLoRAError
from .coordinator import COORDINATORS, GCN
from .filters import FILTERS, ExpertGates, Filter, HeadGates
from .gates import LogisticNoise
from .graph import DepthGraph
from .kinds import SIDES, Factors, Kind, discover, matches, residual_side
from .regularizers import REGULARIZERS
from .selection import Selection

Noise = list[Tensor | None]
"""Noise of each filter of a map in one training step; None for a filter without."""


@dataclass(frozen=True)
class Parts:
    """What a map is built of. `attach(..., parts=Parts(filter=Mine))` tries an idea outside the package.

    Args:
        discover (`Callable`): (model, adapter_name) -> list of `Kind`, which modules are trained and what is
            one kind.
        filter (`Callable`, *optional*): (shape, config, device) -> `Filter` of the directions; by
            `config.filter` where omitted.
        graph (`Callable`): (kind, config) -> `DepthGraph`.
        coordinator (`Callable`, *optional*): (rank, layers, activation) -> `GCN` or its like; by
            `config.coordinator` where omitted.
        noise (`Callable`): (seed) -> an object with the `draw` of `LogisticNoise`.

    Under FSDP2 and ZeRO each rank maps a slice of the width. A part that sums over the width has an attribute
    `sum_over_width`, which is then set to the sum over all slices. A coordinator of several rounds has an
    attribute `passing`, which is then set to what takes closed directions out of features.
    """

    discover: Callable[[nn.Module, str], list[Kind]] = discover
    filter: Callable[[tuple[int, int], StructLoRAConfig, torch.device], Filter] | None = None
    graph: Callable[[Kind, StructLoRAConfig], DepthGraph] = DepthGraph.over_depth
    coordinator: Callable[[int, int, str], GCN] | None = None
    noise: Callable[[int], LogisticNoise] = LogisticNoise


DEFAULT_PARTS = Parts()


class KindMap(nn.Module):
    """The map of one kind: its filters, its graph and its coordinators.

    Args:
        kind (`Kind`): the modules it maps.
        config (`StructLoRAConfig`): which parts act.
        origin_A (`Tensor`): A₀, (N, r, k) or (1, r, k) where it is equal for all nodes; kept where lora_A is
            compared.
        origin_B (`Tensor`, *optional*): B₀, (N, d, r); zero where omitted. The gates leave it as it is, but
            for VeRA.
        parts (`Parts`, *optional*): what to build it of, where that is not the package's own.
        head_of (`Tensor`, *optional*): where heads are gated, the head of each row of lora_B or column of
            lora_A, (n,).

    Attributes:
        sides (`tuple[str, ...]`): the factors that are compared across depth: 'A', 'B', both or none.
    """

    def __init__(
        self,
        kind: Kind,
        config: StructLoRAConfig,
        origin_A: Tensor,
        origin_B: Tensor | None = None,
        parts: Parts = DEFAULT_PARTS,
        head_of: Tensor | None = None,
    ):
        super().__init__()
        self.kind, self.config, self.sides = kind, config, compared_sides(kind, config)
        self.register_buffer("origin_A", origin_A if "A" in self.sides else None)
        self.register_buffer("origin_B", origin_B)
        nodes, build = kind.node_count, parts.filter or FILTERS[config.filter]
        self.filters = nn.ModuleList([build((nodes, kind.rank), config, kind.device)])
        if config.expert_gates and kind.is_expert:
            self.filters.append(ExpertGates(nodes, config, kind.device))
        if kind.heads:
            side, count = kind.heads
            self.filters.append(HeadGates((nodes, count), config, kind.device, side, head_of))
        self.selection = None if config.keep is None else Selection((nodes, kind.rank), kind.device)
        self.graph = parts.graph(kind, config)
        self.coordinators = nn.ModuleDict()
        if config.coordinator != "none" and kind.depth_count > 1:
            build = parts.coordinator or COORDINATORS[config.coordinator]
            for side in self.sides:
                coordinator = build(kind.rank, config.coordinator_layers, config.activation)
                if self.selection is not None and hasattr(coordinator, "passing"):
                    coordinator.passing = self.selection.messages
                self.coordinators[side] = coordinator.to(kind.device)

    def forward(self, latent: Factors, noise: Noise | None = None) -> Factors:
        """Effective factors of latent ones. A factor that nothing acts on is returned as it is.

        Args:
            latent (`Factors`): fp32.
            noise (`list[Tensor]`, *optional*): logistic noise of each filter in training, None at evaluation.
        """
        filtered = self._filtered(latent, noise)
        effective = Factors(
            *(self._coordinated(side, factor) for side, factor in zip(SIDES, filtered, strict=True))
        )
        return effective if self.selection is None else self.selection(effective)

    def pullback(
        self, latent: Factors, gradient: Factors, noise: Noise | None
    ) -> tuple[Factors, dict[str, Tensor]]:
        """The gradient of effective factors, carried to latent factors and to the map's own parameters.

        One vector-Jacobian product; by the chain rule this is training through the map.

        Args:
            latent (`Factors`): fp32, as they were when the effective factors were made.
            gradient (`Factors`): fp32 gradients of the task loss with respect to the effective factors.
            noise (`list[Tensor]`, *optional*): the same noise as in `forward`.

        Returns:
            Gradients of the latent factors, and a dict from parameter name to gradient, both of the task loss
            alone. Of slices of the width, the latter add up to those of the whole.
        """
        leaves = Factors(*(factor.detach().requires_grad_() for factor in latent))
        names, own = [name for name, _ in self.named_parameters()], list(self.parameters())
        with torch.enable_grad():
            effective = self(leaves, noise)
            grads = torch.autograd.grad(effective, [*leaves, *own], gradient, materialize_grads=True)
        return Factors(*grads[:2]), dict(zip(names, grads[2:], strict=True))

    def objective_gradients(self, task: dict[str, Tensor], kl_scale: float) -> dict[str, Tensor]:
        """The map's task gradients turned into those of L_task + λ(β·KL − γ·I), for the gate logits.

        Args:
            task (`dict`): what `pullback` returned.
            kl_scale (`float`): λβ over the number of gates in the model, so that the KL is a mean over all of
                them.
        """
        logits = {f"filters.{i}.logits": gate for i, gate in enumerate(self.filters)}
        return {n: logits[n].objective_gradient(g, kl_scale) if n in logits else g for n, g in task.items()}

    def regularizer_gradient(
        self, latent: Factors, sum_over_width: Callable[[Tensor], Tensor] = lambda x: x
    ) -> Factors | None:
        """Gradient of `regularizer_weight` times the regulariser of latent updates; None where none acts.

        Args:
            latent (`Factors`): fp32.
            sum_over_width (`Callable`, *optional*): where factors are slices, sums a tensor over all slices.
        """
        if self.config.regularizer == "none" or not self.joins_depths:
            return None
        penalty = REGULARIZERS[self.config.regularizer]
        leaves = Factors(*(factor.detach().requires_grad_() for factor in latent))
        with torch.enable_grad():
            updates = [self.graph.by_expert(u).flatten(2) for u in self.features(leaves).values()]
            total = self.config.regularizer_weight * sum(penalty(u, sum_over_width) for u in updates)
            return Factors(*torch.autograd.grad(total, leaves, materialize_grads=True))

    @property
    def joins_depths(self) -> bool:
        """Whether a gradient at one depth may reach others."""
        return self.config.compares_depths and self.kind.depth_count > 1 and bool(self.sides)

    def features(self, factors: Factors) -> dict[str, Tensor]:
        """Node features by side, the updates that are comparable across depth: (N, r, n) each. Zero for
        directions that selection has closed.
        """
        return {side: self._passing(self._feature(side, getattr(factors, side))) for side in self.sides}

    def stream_factors(self, factors: Factors) -> Factors | None:
        """The update as the residual stream sees it: the factor on the stream's side with its origin taken
        out, (N, r, n), and the factor on the other side, (N, r, p). None where the kind's role is unknown,
        A₀ was not kept, or there is no other side (VeRA).
        """
        side = residual_side(self.kind, self.config.roles)
        if side is None or (side == "A" and self.origin_A is None) or self.kind.is_vera:
            return None
        other = factors.A if side == "B" else factors.B.mT
        return Factors(self._feature(side, getattr(factors, side)), other)

    def openness(self, latent: Factors) -> list[Tensor | None]:
        """Probability that each gate is open, by filter: directions (N, r), experts (N, 1), heads (N, H).

        0 or 1 for 'topk_norm', and 0 for what selection has closed; None for a filter that does not decide.
        """
        update = self._update(latent)
        directions, *groups = [gate.openness(update) for gate in self.filters]
        if self.selection is not None and self.selection.is_made:
            kept = self.selection.kept
            directions = kept.float() if directions is None else directions * kept
        return [directions, *groups]

    @property
    def filter(self) -> Filter:
        """The filter of the directions, which the gates of experts and heads follow."""
        return self.filters[0]

    @property
    def gate_logits(self) -> list[nn.Parameter]:
        """Logits of all gates that learn."""
        return [gate.logits for gate in self.filters if gate.logits is not None]

    @property
    def gate_count(self) -> int:
        """Gates of all filters."""
        return sum(math.prod(gate.shape) for gate in self.filters)

    def _filtered(self, latent: Factors, noise: Noise | None) -> Factors:
        start = update = self._update(latent)
        for gate, drawn in zip(self.filters, noise or [None] * len(self.filters), strict=True):
            update = gate(update, drawn)
        if update is start:  # nothing is filtered, and B₀ + (B − B₀) would round
            return latent
        return update if self._unfiltered is None else update._replace(B=self._unfiltered + update.B)

    def _update(self, factors: Factors) -> Factors:
        return factors if self._unfiltered is None else factors._replace(B=factors.B - self._unfiltered)

    @property
    def _unfiltered(self) -> Tensor | None:
        """The part of lora_B that holds base weights, which no gate may close; None where there is none."""
        return None if self.kind.is_vera else self.origin_B

    def _coordinated(self, side: str, factor: Tensor) -> Tensor:
        """A filtered factor with what message passing adds."""
        if side not in self.coordinators:
            return factor
        added = self.coordinators[side](self._passing(self._feature(side, factor)), self.graph)
        return factor + (added if side == "A" else added.mT)

    def _passing(self, features: Tensor) -> Tensor:
        return features if self.selection is None else self.selection.messages(features)

    def _feature(self, side: str, factor: Tensor) -> Tensor:
        """The update on one side with the rank axis first, (N, r, n)."""
        origin = {"A": self.origin_A, "B": self.origin_B}[side]
        update = factor if origin is None else factor - origin
        return update if side == "A" else update.mT

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # Of (1, r, k) or (N, r, k), as the run started.
        if f"{prefix}origin_A" in state_dict and self.origin_A is not None:
            self.origin_A = torch.empty_like(state_dict[f"{prefix}origin_A"], device=self.kind.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


def compared_sides(kind: Kind, config: StructLoRAConfig) -> tuple[str, ...]:
    """The factors of a kind that are compared across depth: ('A',), ('B',), both; none where its role is
    unknown. Of VeRA always λ_d, since all modules share their directions.
    """
    if kind.is_vera:
        return ("B",)
    if config.side == "both":
        return SIDES
    if config.side != "auto":
        return ("B",) if config.side == "write" else ("A",)
    side = residual_side(kind, config.roles)
    return () if side is None else (side,)


def mapped_sides(kind: Kind, config: StructLoRAConfig, parts: Parts = DEFAULT_PARTS) -> tuple[str, ...]:
    """The factors of a kind that its map changes, or reads to change others. Ranks move no more."""
    if parts.filter is not None or parts.coordinator is not None:
        return kind.sides
    mapped = _changed_sides(kind, config) | ({"A"} if config.filter == "topk_norm" else set())
    return tuple(side for side in kind.sides if side in mapped)


def _changed_sides(kind: Kind, config: StructLoRAConfig) -> set[str]:
    """The factors of a kind that the package's own parts change."""
    changed = set(compared_sides(kind, config)) if config.compares_depths and kind.depth_count > 1 else set()
    if config.filters_directions:
        changed.add("B")
    if kind.heads:
        changed.add(kind.heads.side)
    return changed


def refuse_unmappable(kinds: list[Kind], config: StructLoRAConfig) -> None:
    """Stop before anything is touched where the map cannot act as asked.

    Raises:
        StructLoRAError: a coordinator is asked for and no kind has two depths; a pattern of `roles` matches
            no kind; or a factor that would be mapped is frozen.
    """
    for pattern in config.roles or ():
        if not any(matches(pattern, kind) for kind in kinds):
            targets = ", ".join(sorted({kind.target.rsplit(".", 1)[-1] for kind in kinds}))
            raise StructLoRAError(
                f"`roles` with '{pattern}', the end of no adapted module's name",
                f"patterns of what the adapter adapts ({targets})",
                "correct the pattern, or remove it",
            )
    if config.coordinator != "none" and all(kind.depth_count == 1 for kind in kinds):
        raise StructLoRAError(
            f"only one depth in every kind ({', '.join(kind.name for kind in kinds)})",
            "two depths or more of some kind for a coordinator",
            "adapt more layers, or set `coordinator='none'`",
        )
    for kind in kinds:
        for side in sorted(_changed_sides(kind, config)):
            if not getattr(kind, side)[0].requires_grad:
                remedy = (
                    "set `side='write'` or `coordinator='none'`"
                    if side == "A"
                    else "train it, or set `filter='none'` and remove `keep`"
                )
                raise StructLoRAError(
                    f"lora_{side} of '{kind.name}' frozen",
                    f"a trainable lora_{side}, since StructLoRA maps it",
                    remedy,
                )
