"""The latent-to-effective map of one kind, and its pullback.

    latent (A, B)  --gates-->  (A, B̃ = B·diag(m)/m₀)  --message passing-->  effective (A', B')

The optimizer steps the latent factors; the model computes with the effective ones. All depths of a kind go through the
map at once: A is (L, r, k), B is (L, d, r), and ΔW = s·B·A at each depth. Experts of a mixture are
taken apart first: A (E, L, r, k), B (E, L, d, r), and whatever follows has that leading axis too.

Updates count from an origin: A₀ at attach, and B₀ = 0, except for initialisations that move part of the base weights into
the adapter (PiSSA and the like). There B₀ is B at attach and the gates act on B − B₀: to gate the whole of B would switch the
base model's own principal directions on and off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import StructLoRAConfig
from ..errors import StructLoRAError
from .columns import map_columns, pull_columns
from .coordinator import COORDINATORS, GCN
from .filters import FILTERS, Filter
from .gates import LogisticNoise
from .graph import DepthGraph
from .nodes import Kind, discover, matches, residual_side
from .regularizers import REGULARIZERS
from .width import AXIS, WHOLE, Width


class Factors(NamedTuple):
    """Stacked factors of a kind, or anything of their shapes: A (L, r, k), B (L, d, r). Experts are as PEFT keeps them: those that
    are one parameter in A (L, E·r, k) with rows in the order (expert, r), B (L, d, r·E) with columns in the order (r, expert);
    those that are modules in A (L·E, r, k), B (L·E, d, r) in the order (depth, expert)."""

    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Parts:
    """What a map is built of. `attach(..., parts=Parts(filter=Mine))` tries an idea without changing the package.

    Args:
        discover (`Callable`): (model, adapter_name) -> list of `Kind`, which modules are trained and what is one kind.
        filter (`Callable`, *optional*): (shape, config, device) -> `Filter`; by `config.filter` where omitted.
        graph (`Callable`): (kind, config) -> `DepthGraph`.
        coordinator (`Callable`, *optional*): (rank, layers, activation) -> `GCN` or its like; by `config.coordinator` where
            omitted.
        noise (`Callable`): (seed) -> an object with the `draw` of `LogisticNoise`.

    Under FSDP2 and ZeRO each rank maps a slice of the width: sums over it are what the part's attribute `width` (`Width`) makes
    of them.
    """

    discover: Callable[[nn.Module, str], list[Kind]] = discover
    filter: Callable[[tuple[int, ...], StructLoRAConfig, torch.device], Filter] | None = None
    graph: Callable[[Kind, StructLoRAConfig], DepthGraph] = DepthGraph.over_depth
    coordinator: Callable[[int, int, str], GCN] | None = None
    noise: Callable[[int], LogisticNoise] = LogisticNoise


DEFAULT_PARTS = Parts()

SIDES = Factors._fields

Kept = dict[str, Tensor]
"""What a map writes one kind's factors into, by side, for those who need them for a moment only."""


class KindMap(nn.Module):
    """The map of one kind: its filter, its graph and its coordinator.

    Args:
        kind (`Kind`): the modules it maps.
        config (`StructLoRAConfig`): which parts act.
        origin_A (`Tensor`): A₀, (L, r, k) or (1, r, k) where all depths are equal; kept where lora_A is compared.
        origin_B (`Tensor`, *optional*): B₀, (L, d, r); zero where omitted.
        parts (`Parts`, *optional*): what to build it of, where that is not the package's own.
        width (`Width`, *optional*): who has which slice of the factors, where ranks share them.
    """

    def __init__(
        self,
        kind: Kind,
        config: StructLoRAConfig,
        origin_A: Tensor,
        origin_B: Tensor | None = None,
        parts: Parts = DEFAULT_PARTS,
        width: Width = WHOLE,
    ):
        super().__init__()
        self.kind, self.config, self.width = kind, config, width
        self.sides, self.moved = compared_sides(kind, config), moved_sides(kind, config, parts)
        self.register_buffer("origin_A", origin_A if "A" in self.sides else None)
        self.register_buffer("origin_B", origin_B)
        gates = (kind.depth_count, kind.rank) if kind.experts == 1 else (kind.experts, kind.depth_count, kind.rank)
        self.filter = (parts.filter or FILTERS[config.filter])(gates, config, kind.device)
        self.filter.width = width
        self.groups, self.heads = None, kind.heads
        extra = self.heads.count if self.heads else 1 if config.expert_gates and kind.is_expert else 0
        if extra:
            self.groups = FILTERS["ib"]((*gates[:-1], extra), config, kind.device)
        if self.heads:
            self.register_buffer("_head_of", self._find_heads(), persistent=False)
        self.graph = parts.graph(kind, config)
        self.coordinators = nn.ModuleDict()
        if config.coordinator != "none" and kind.depth_count > 1:
            build = parts.coordinator or COORDINATORS[config.coordinator]
            for side in self.sides:
                coordinator = build(kind.rank, config.coordinator_layers, config.activation)
                coordinator.width = width
                self.coordinators[side] = coordinator.to(kind.device)

    @property
    def gate_count(self) -> int:
        """Gates that are sampled: one per direction and depth, and those of groups."""
        return math.prod(self.noise_shape)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of a step's noise, (L, r); with gates of groups (L, r + groups), theirs behind the directions'."""
        *lead, rank = self.filter.shape
        return *lead, rank + (self.groups.shape[-1] if self.groups is not None else 0)

    @property
    def gate_logits(self) -> dict[str, nn.Parameter]:
        """Logits of all gates that learn, by name."""
        filters = {"filter": self.filter, "groups": self.groups}
        logits = {f"{name}.logits": f.logits for name, f in filters.items() if f is not None}
        return {name: parameter for name, parameter in logits.items() if parameter is not None}

    @property
    def is_columnwise(self) -> bool:
        """Whether each column of a factor (one of k in A, of d in B) is mapped alike and by itself, as the parts say of
        themselves. Then the map works on blocks of columns."""
        if self.heads:
            return False
        parts = [self.filter, *self.coordinators.values(), *([self.graph] if self.coordinators else [])]
        # Not `part.is_columnwise`: what a subclass changes may undo the claim, so that it must make it anew.
        return all(vars(type(part)).get("is_columnwise", False) for part in parts)

    def forward(
        self,
        latent: Factors,
        noise: Tensor | None,
        sides: tuple[str, ...] = SIDES,
        kept: Kept | None = None,
        rows: list[int] | None = None,
    ) -> Factors:
        """Effective factors of latent ones. A factor that nothing acts on is returned as it is.

        Args:
            latent (`Factors`): fp32.
            noise (`Tensor`, *optional*): (L, r) logistic noise in training, None at evaluation. It reaches B alone.
            sides (`tuple[str, ...]`, *optional*): the factors that are asked for, both by default; None for one that is not.
            kept (`dict`, *optional*): tensors to write into, empty at first. What was returned before is gone then.
            rows (`list[int]`, *optional*): where B is not of all depths, (L, d, r), but rows of some, (R, 1, r): how many of
                each depth. See `maps_by_row`.
        """
        if torch.is_grad_enabled() or not self.is_columnwise:
            filtered = self._filtered(latent, noise, rows)

            def coordinated(side: str) -> Tensor | None:
                return self._coordinated(side, getattr(filtered, side), self._origin(side)) if side in sides else None

            return Factors(*map(coordinated, SIDES))
        gates = self._gates(latent, noise, rows)

        def mapped(side: str) -> Tensor | None:
            factor = getattr(latent, side)
            if side not in sides:
                return None
            if not self._acts_on(side, gates):
                return factor
            function, room = partial(self._mapped, side, gates), _room(kept, side, factor)
            return map_columns(function, factor, self._origin(side), AXIS[side], room)

        return Factors(*map(mapped, SIDES))

    def split(self, factors: Factors) -> Factors:
        """Factors of one module each: themselves, or of experts (E, L, r, k), (E, L, d, r)."""
        return split(factors, self.kind)

    def openness(self, latent: Factors) -> Tensor | None:
        """Probability that each direction is open, (L, r), with experts (E, L, r): σ(φ); 0 or 1 for 'topk_norm'; None where
        no filter decides."""
        return self.filter.openness(*self.split(self._update(latent)))

    @property
    def group_openness(self) -> Tensor | None:
        """Probability that each head is open, (L, H), or each expert, (E, L, 1), (L, 1); None without gates of these."""
        return None if self.groups is None else self.groups.openness(None, None)

    def ungated(self, latent: Factors, change: Factors) -> Factors:
        """A change of gated factors at evaluation as one of latent ones: divided by the gates of `latent`, where these are open."""
        gates = self._gates(self._update(latent), None, None)
        if gates is not None:
            change = change._replace(B=self._times(change.B, _inverse(gates)))
        return self._times_heads(change, _inverse(self._group_gates(None))) if self.heads else change

    def pullback(
        self,
        latent: Factors,
        gradient: Factors,
        noise: Tensor | None,
        scale: float | Tensor = 1.0,
        kept: Kept | None = None,
        rows: list[int] | None = None,
    ) -> tuple[Factors, dict[str, Tensor]]:
        """The gradient with respect to effective factors, carried to latent factors and to the map's own parameters.

        One vector-Jacobian product; by the chain rule this is training through the map.

        Args:
            latent (`Factors`): fp32, as they were when the effective factors were made.
            gradient (`Factors`): fp32 gradients of the task loss with respect to the effective factors, times `scale`.
            noise (`Tensor`, *optional*): the same noise as in `forward`.
            scale (`float` or `Tensor`, *optional*, defaults to 1.0): loss scale of mixed precision.
            kept, rows (*optional*): as in `forward`.

        Returns:
            Gradients of the latent factors (still times `scale`), and a dict from parameter name to gradient (unscaled),
            both of the task loss alone.
        """
        if self.is_columnwise:
            pulled, own = self._pulled_columns(latent, gradient, noise, kept, rows)
        else:
            pulled, own = self._pulled_whole(latent, gradient, noise, rows)
        return pulled, {name: own[parameter] / scale for name, parameter in self.named_parameters()}

    def objective_gradients(self, task: dict[str, Tensor], kl_scale: float) -> dict[str, Tensor]:
        """Task gradients of the map's parameters turned into those of L_task + λ(β·KL − γ·I), for the gate logits.

        Args:
            task (`dict`): what `pullback` returned.
            kl_scale (`float`): λβ over the number of gates in the model, so that the KL is a mean over all of them.
        """
        filters = {"filter.logits": self.filter, "groups.logits": self.groups}
        return {n: filters[n].objective_gradient(g, kl_scale) if n in filters else g for n, g in task.items()}

    def regularizer_gradient(self, latent: Factors) -> Factors | None:
        """Gradient of `regularizer_weight` times the static regulariser of the latent updates; None where none acts."""
        if self.config.regularizer == "none" or self.kind.depth_count == 1:
            return None
        penalty = REGULARIZERS[self.config.regularizer]
        leaves = Factors(*(factor.detach().requires_grad_() for factor in latent))
        with torch.enable_grad():
            penalties = sum(penalty(u.flatten(-2), self.width) for u in self.features(leaves))
            total = self.config.regularizer_weight * penalties
        return Factors(*torch.autograd.grad(total, leaves, materialize_grads=True))

    def whole_state(self, latent: Factors) -> tuple[Factors, dict[str, Tensor], dict[str, Tensor]]:
        """Latent factors, `state_dict()` and that of the graph, all of them of the whole width; a collective where ranks share
        it, and on the CPU then: no device need have room for the whole."""
        latent, own, graph = self._over_width(latent, self.state_dict(), self.graph.state_dict(), self.width.whole)
        if not self.width.is_shared:
            return latent, own, graph
        return Factors(*(f.cpu() for f in latent)), *({n: x.cpu() for n, x in part.items()} for part in (own, graph))

    def restore(self, latent: Factors, own: dict[str, Tensor], graph: dict[str, Tensor]) -> Factors:
        """Take over what `whole_state` returned. Returns the latent factors of this rank."""
        latent, own, graph = self._over_width(latent, own, graph, self.width.part)
        latent = Factors(*(factor.to(self.kind.device) for factor in latent))
        if "origin_A" in own:  # (1, r, k) or (L, r, k), as the run started
            self.origin_A = torch.empty_like(own["origin_A"], device=self.kind.device)
        self.load_state_dict(own)
        self.graph.load_state_dict(graph)
        return latent

    def _over_width(self, latent: Factors, own: dict, graph: dict, change: Callable) -> tuple[Factors, dict, dict]:
        """A state with `Width.whole` or `Width.part` of all that has a width."""
        latent = Factors(*(change(getattr(latent, side), side) for side in SIDES))
        own = {n: change(x, n[-1]) if n in ("origin_A", "origin_B") else x for n, x in own.items()}
        if "features" in graph and self.width.is_shared:
            pieces = zip(self.sides, self._by_side(graph["features"]), strict=True)
            graph = {
                **graph,
                "features": torch.cat([change(piece, side).flatten(-2) for side, piece in pieces], dim=-1),
            }
        return latent, own, graph

    def _by_side(self, flat: Tensor) -> list[Tensor]:
        """What `side_gradients` flattened, apart again: (L, r, k) and (L, d, r), of the whole width or of this rank's slice."""
        _, _, *widths = self.kind.shape
        widths = [dict(zip(SIDES, widths, strict=True))[side] for side in self.sides]
        if flat.shape[-1] != self.kind.rank * sum(widths):
            widths = [self.width.size(side) for side in self.sides]
        pieces = flat.split([self.kind.rank * size for size in widths], dim=-1)
        shapes = [
            (self.kind.rank, size) if side == "A" else (size, self.kind.rank)
            for side, size in zip(self.sides, widths, strict=True)
        ]
        return [piece.unflatten(-1, shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def features(self, factors: Factors) -> list[Tensor]:
        """Node features, the updates on the sides that are comparable across depth: (L, r, n) each."""
        return [self._features(side, getattr(factors, side), self._origin(side)) for side in self.sides]

    def stream_factors(self, factors: Factors) -> Factors | None:
        """The update as the residual stream sees it: the factor on the stream's side with its origin taken out, (L, r, n), and
        the factor on the other side, (L, r, p). None where the kind's role is unknown or A₀ was not kept.
        """
        side = residual_side(self.kind, self.config.roles)
        if side is None or (side == "A" and self.origin_A is None):
            return None
        A, B = self.split(factors)
        return Factors(self._features(side, getattr(factors, side), self._origin(side)), A if side == "B" else B.mT)

    @property
    def gradient_size(self) -> int:
        """Entries of `side_gradients` at each depth (of each expert)."""
        _, _, columns, rows = self.kind.shape
        return sum(self.kind.rank * {"A": columns, "B": rows}[side] for side in self.sides)

    @property
    def sees_gradients(self) -> bool:
        """Whether gradients of several depths are there on those sides: ranks that share factors move what the map needs alone."""
        return self.kind.depth_count > 1 and (not self.width.is_shared or set(self.sides) <= set(self.moved))

    def side_gradients(self, gradient: Factors) -> Tensor:
        """Gradients on those sides, flattened: (L, n)."""
        parts = self.split(gradient)
        flat = [getattr(parts, side).flatten(-2) for side in self.sides]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)

    def _filtered(self, latent: Factors, noise: Tensor | None, rows: list[int] | None = None) -> Factors:
        update = self._update(latent)
        if rows is None:
            A, B = self.split(update)
            filtered = self.filter(A, B, self._noise_of("directions", noise))
            if self.groups is not None and not self.heads:
                filtered = filtered * self._group_gates(noise).unsqueeze(-2)
            if filtered is B and not self.heads:  # nothing is filtered, and B₀ + (B − B₀) would round
                return latent
            filtered = _joined(filtered, "B", self.kind)
        else:
            filtered = self._times(update.B, self._gates(latent, noise, rows))
        factors = Factors(latent.A, filtered)
        if self.heads:
            factors = self._times_heads(factors, self._group_gates(noise))
        return factors if self.origin_B is None else factors._replace(B=self.origin_B + factors.B)

    def _update(self, factors: Factors) -> Factors:
        return factors if self.origin_B is None else Factors(factors.A, factors.B - self.origin_B)

    def _pulled_whole(
        self, latent: Factors, gradient: Factors, noise: Tensor | None, rows: list[int] | None
    ) -> tuple[Factors, dict[nn.Parameter, Tensor]]:
        leaves = Factors(*(factor.detach().requires_grad_() for factor in latent))
        own = list(self.parameters())
        with torch.enable_grad():
            effective = self(leaves, noise, rows=rows)
        pulled = torch.autograd.grad(effective, [*leaves, *own], gradient)
        return Factors(*pulled[:2]), dict(zip(own, pulled[2:], strict=True))

    def _pulled_columns(
        self, latent: Factors, gradient: Factors, noise: Tensor | None, kept: Kept | None, rows: list[int] | None
    ) -> tuple[Factors, dict[nn.Parameter, Tensor]]:
        own = {}
        with torch.enable_grad():
            gates = self._gates(latent, noise, rows)

        def pulled(side: str) -> Tensor:
            arriving = getattr(gradient, side)
            if not self._acts_on(side, gates):
                return arriving
            weights = list(self.coordinators[side].parameters()) if side in self.coordinators else []
            learns = side == "B" and gates is not None and gates.requires_grad
            left, sums = pull_columns(
                partial(self._mapped, side, gates),
                getattr(latent, side),
                self._origin(side),
                arriving,
                [*weights, gates] if learns else weights,
                AXIS[side],
                _room(kept, side, arriving),
            )
            own.update(zip(weights, sums, strict=False))
            if learns:
                logits = list(self.gate_logits.values())
                own.update(zip(logits, torch.autograd.grad(gates, logits, sums[-1]), strict=True))
            return left

        return Factors(*map(pulled, SIDES)), own

    def _gates(self, latent: Factors, noise: Tensor | None, rows: list[int] | None) -> Tensor | None:
        """Of each depth, (L, r), with experts (E, L, r). Where B is rows, of each row, (R, r), or where a module holds all experts
        of a layer, (E, R, r)."""
        factors = self.split(latent) if rows is None else latent  # which gates do not depend on where B is rows
        gates = self.filter.gates(*factors, self._noise_of("directions", noise))
        if self.groups is not None and not self.heads:
            of_experts = self._group_gates(noise)
            gates = of_experts.expand(self.filter.shape) if gates is None else gates * of_experts
        if gates is None or rows is None:
            return gates
        if self.kind.per_depth > 1:
            gates = by_module(gates, self.kind).squeeze(1)
        # Not `repeat_interleave`, whose gradient is not deterministic on CUDA.
        of_depths = [
            gate.expand(*gate.shape[:-2], count, -1) for gate, count in zip(gates.split(1, -2), rows, strict=True)
        ]
        return torch.cat(of_depths, dim=-2)

    def _group_gates(self, noise: Tensor | None) -> Tensor:
        """Of heads, (L, H); of experts, (E, L, 1), or (L, 1) of modules that are one expert each."""
        return self.groups.gates(None, None, self._noise_of("groups", noise))

    def _noise_of(self, gates: str, noise: Tensor | None) -> Tensor | None:
        """The directions' part of a step's noise, or that of groups."""
        if noise is None or self.groups is None:
            return noise
        rank = self.filter.shape[-1]
        return noise[..., :rank] if gates == "directions" else noise[..., rank:]

    def _find_heads(self) -> Tensor:
        """For each entry of the width on the heads' side (of this rank's slice), the number of its head: (n,)."""
        _, _, *widths = self.kind.shape
        size = dict(zip(SIDES, widths, strict=True))[self.heads.side]
        numbers = torch.arange(size, device=self.kind.device) // (size // self.heads.count)
        stacked = numbers[None, None, :] if self.heads.side == "A" else numbers[None, :, None]
        return self.width.part(stacked, self.heads.side).flatten()

    def _acts_on(self, side: str, gates: Tensor | None) -> bool:
        return side in self.coordinators or (side == "B" and gates is not None)

    def _mapped(self, side: str, gates: Tensor | None, factor: Tensor, origin: Tensor | None) -> Tensor:
        """One effective factor, or some of its columns with those of its origin."""
        if side == "B" and gates is not None:
            filtered = self._times(factor if origin is None else factor - origin, gates)
            factor = filtered if origin is None else origin + filtered
        return self._coordinated(side, factor, origin)

    def _coordinated(self, side: str, factor: Tensor, origin: Tensor | None) -> Tensor:
        """A filtered factor with what message passing adds."""
        if side not in self.coordinators:
            return factor
        added = self.coordinators[side](self._features(side, factor, origin), self.graph)
        return factor + _joined(added if side == "A" else added.mT, side, self.kind)

    def _times(self, B: Tensor, gates: Tensor) -> Tensor:
        """B with the columns of each module, or of each row, times its gates."""
        if gates.dim() == 2:
            return B * gates.unsqueeze(-2)
        return _joined(_split(B, "B", self.kind) * gates.unsqueeze(-2), "B", self.kind)

    def _times_heads(self, factors: Factors, gates: Tensor) -> Factors:
        """Factors with the rows of lora_B, or columns of lora_A, that belong to each head times its gate, (L, H)."""
        of_width = gates[..., self._head_of]  # (L, n)
        if self.heads.side == "A":
            return factors._replace(A=factors.A * of_width.unsqueeze(-2))
        return factors._replace(B=factors.B * of_width.unsqueeze(-1))

    def _features(self, side: str, factor: Tensor, origin: Tensor | None) -> Tensor:
        update = factor if origin is None else factor - origin
        parts = _split(update, side, self.kind)
        return parts if side == "A" else parts.mT

    def _origin(self, side: str) -> Tensor | None:
        return {"A": self.origin_A, "B": self.origin_B}[side]


def _inverse(gates: Tensor) -> Tensor:
    """1 / gates, 1 where they are closed."""
    return torch.where(gates > 0, gates, 1).reciprocal()


def _room(kept: Kept | None, side: str, like: Tensor) -> Tensor | None:
    """Where to write a factor, None for a new tensor."""
    if kept is None:
        return None
    if side not in kept:
        kept[side] = torch.empty_like(like)
    return kept[side]


def split(factors: Factors, kind: Kind) -> Factors:
    """Stacked factors as those of one module each: themselves, or of experts (E, L, r, k), (E, L, d, r)."""
    return Factors(*(_split(getattr(factors, side), side, kind) for side in SIDES))


def by_module(x: Tensor, kind: Kind) -> Tensor:
    """Anything of each depth or expert, (L, ...) or (E, L, ...), by module and expert within it: (modules, E or 1, ...)."""
    if kind.per_depth > 1:
        return x.transpose(0, 1).flatten(0, 1).unsqueeze(1)
    return x.unsqueeze(1) if kind.experts == 1 else x.transpose(0, 1)


def first_everywhere(A: Tensor, kind: Kind) -> Tensor:
    """Stacked lora_A that are all the first one: of all depths, and of all experts."""
    first = A[:1, : kind.rank].clone()
    return first.repeat(1, kind.adapted.experts, 1).expand_as(A)


def _split(factor: Tensor, side: str, kind: Kind) -> Tensor:
    """One stacked factor as that of one module each: itself, or of experts (E, L, r, k), (E, L, d, r)."""
    if kind.per_depth > 1:
        return factor.unflatten(0, (-1, kind.per_depth)).transpose(0, 1)
    if kind.experts == 1:
        return factor
    if side == "A":
        return factor.unflatten(1, (kind.experts, -1)).transpose(0, 1)
    return factor.unflatten(2, (-1, kind.experts)).movedim(3, 0)


def _joined(factor: Tensor, side: str, kind: Kind) -> Tensor:
    """What `_split` took apart, as it was."""
    if kind.per_depth > 1:
        return factor.transpose(0, 1).flatten(0, 1)
    if kind.experts == 1:
        return factor
    return factor.transpose(0, 1).flatten(1, 2) if side == "A" else factor.movedim(0, 3).flatten(2)


def compared_sides(kind: Kind, config: StructLoRAConfig) -> tuple[str, ...]:
    """The factors of a kind that are compared across depth: ('A',), ('B',) or both.

    Raises:
        StructLoRAError: `side='auto'`, depths are to be compared, and the module's role is unknown.
    """
    if config.side == "both":
        return ("A", "B")
    if config.side != "auto":
        return ("B",) if config.side == "write" else ("A",)
    side = residual_side(kind, config.roles)
    if side is None and config.compares_depths and kind.depth_count > 1:
        leaf = kind.target.rsplit(".", 1)[-1]
        raise StructLoRAError(
            f"module '{kind.target}', whose role is unknown",
            "to know whether it reads the residual stream (its lora_A is comparable across depth) or writes it (its lora_B is)",
            f"set `roles={{'{leaf}': 'read'}}` or `'write'`, or choose `side` yourself",
        )
    return (side or "A",)


def moved_sides(kind: Kind, config: StructLoRAConfig, parts: Parts = DEFAULT_PARTS) -> tuple[str, ...]:
    """The factors of a kind that its map changes, or reads to change others. Ranks that share factors need bring no more."""
    if parts.filter is not None or parts.coordinator is not None:
        return SIDES
    moved = set(compared_sides(kind, config)) if config.compares_depths and kind.depth_count > 1 else set()
    if config.filter != "none":
        moved.add("B")
    if config.filter == "topk_norm":
        moved.add("A")
    if kind.heads:
        moved.add(kind.heads.side)
    return tuple(sorted(moved))


def maps_by_row(kind: Kind, config: StructLoRAConfig, parts: Parts = DEFAULT_PARTS) -> bool:
    """Whether gates, of no factor, are all that acts on a kind's lora_B: each of its rows is mapped by itself then, and a rank
    may map whatever rows it owns."""
    if parts.filter is not None or parts.coordinator is not None or config.filter in ("none", "topk_norm"):
        return False
    if kind.heads and kind.heads.side == "B":
        return False
    return not (config.compares_depths and kind.depth_count > 1 and "B" in compared_sides(kind, config))


def refuse_unmappable(kinds: list[Kind], config: StructLoRAConfig) -> None:
    """Stop before anything is touched where the map cannot act as asked.

    Raises:
        StructLoRAError: a coordinator is asked for and no kind has two depths; a pattern of `roles` matches no kind; the role
            of a kind is needed and unknown; or a factor that would be mapped is frozen.
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
        mapped = {"B"} if config.filter != "none" else set()
        if kind.heads:
            mapped.add(kind.heads.side)
        if config.compares_depths and kind.depth_count > 1:
            mapped |= set(compared_sides(kind, config))
        for side in sorted(mapped):
            if not getattr(kind, side)[0].requires_grad:
                remedy = (
                    "set `side='write'` or `coordinator='none'`" if side == "A" else "train it, or set `filter='none'`"
                )
                raise StructLoRAError(
                    f"lora_{side} of '{kind.name}' frozen", f"a trainable lora_{side}, since StructLoRA maps it", remedy
                )
