"""The latent-to-effective map of one kind, and its pullback: message passing over depth, and one mask.

    latent (A, B)  --messages-->  (A', B')  --mask-->  effective (A', B'·diag(kept))

The model holds the effective factors alone; the latent ones are what they are less an offset (`mapped_side.py`).
All nodes of a kind go through the map at once, each side by itself: A is (N, r, k), B is (N, d, r), and
ΔW = s·B·A at each node.

Updates count from an origin: A₀ at attach, and B₀ = 0, except for initialisations that move part of the base
weights into the adapter (PiSSA and the like), where B₀ is B at attach, and for VeRA, whose λ_d starts at a
constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import StructLoRAConfig
from ..errors import StructLoRAError
from .coordinator import COORDINATORS, GCN
from .gates import Gate
from .graph import DepthGraph
from .kinds import SIDES, Factors, Kind, discover, matches, residual_side
from .selection import Chooser, Selection, best


@dataclass(frozen=True)
class Parts:
    """What StructLoRA is built of. `attach(..., parts=Parts(gate=Mine))` tries an idea outside the package.

    Args:
        discover (`Callable`): (model, adapter_name) -> list of `Kind`, which modules are trained and what is
            one kind.
        gate (`Callable`, *optional*): (rank, and openness, device, rank_axis, forward by name) -> `Gate` or its like; by
            `config.gates` where omitted.
        graph (`Callable`): (kind, config) -> `DepthGraph`.
        coordinator (`Callable`, *optional*): (rank, layers) -> `GCN` or its like; by `config.coordinator`
            where omitted.
        choose (`Callable`): (nats of all gated directions, keep) -> which to keep.
    """

    discover: Callable[[nn.Module, str], list[Kind]] = discover
    gate: Callable[..., Gate] | None = None
    graph: Callable[[Kind, StructLoRAConfig], DepthGraph] = DepthGraph.over_depth
    coordinator: Callable[[int, int], GCN] | None = None
    choose: Chooser = best


DEFAULT_PARTS = Parts()


class KindMap(nn.Module):
    """The map of one kind: its graph, its coordinators and its mask.

    Args:
        kind (`Kind`): the modules it maps.
        config (`StructLoRAConfig`): which parts act.
        origin_A (`Tensor`): A₀, (N, r, k) or (1, r, k) where it is equal for all nodes; kept where lora_A is
            compared.
        origin_B (`Tensor`, *optional*): B₀, (N, d, r); zero where omitted.
        parts (`Parts`, *optional*): what to build it of, where that is not the package's own.

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
    ):
        super().__init__()
        self.kind, self.config, self.sides = kind, config, compared_sides(kind, config)
        self.register_buffer("origin_A", origin_A if "A" in self.sides else None)
        self.register_buffer("origin_B", origin_B)
        self.selection = None if config.keep is None else Selection((kind.node_count, kind.rank), kind.device)
        self.graph = parts.graph(kind, config)
        self.coordinators = nn.ModuleDict()
        for side in coordinated_sides(kind, config):
            build = parts.coordinator or COORDINATORS[config.coordinator]
            self.coordinators[side] = build(kind.rank, config.coordinator_layers).to(kind.device)

    def forward(self, side: str, latent: Tensor) -> Tensor:
        """Return the effective factors on one side of latent ones, fp32; what nothing acts on as it is."""
        if side in self.coordinators:
            feature = self._feature(side, self.masked(side, latent))
            added = self.coordinators[side](feature, self.graph, self.kept)
            latent = latent + (added if side == "A" else added.mT)
        return self.masked(side, latent)

    def masked(self, side: str, factor: Tensor) -> Tensor:
        """Return a factor, or a gradient of one, with zeros for the columns of lora_B that selection has closed."""
        return self.selection(factor) if self.selection is not None and side == "B" else factor

    def pullback(self, side: str, latent: Tensor, gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Carry the gradient of effective factors to latent factors and to the coordinator's parameters.

        One vector-Jacobian product; by the chain rule this is training through the map.

        Args:
            side (`str`): 'A' or 'B'.
            latent (`Tensor`): fp32, as they were when the effective factors were made.
            gradient (`Tensor`): fp32 gradients of the task loss with respect to the effective factors.

        Returns:
            Gradients of the latent factors, and one of each of the coordinator's parameters.
        """
        if side not in self.coordinators:
            return self.masked(side, gradient), []
        leaf, own = latent.detach().requires_grad_(), list(self.coordinators[side].parameters())
        with torch.enable_grad():
            pulled, *of_own = torch.autograd.grad(
                self(side, leaf), [leaf, *own], gradient, materialize_grads=True
            )
        return pulled, of_own

    @property
    def kept(self) -> Tensor | None:
        """(N, r) of bool: the directions that selection has kept; None before it, or without."""
        return self.selection.kept if self.selection is not None and self.selection.is_made else None

    def features(self, factors: Factors) -> dict[str, Tensor]:
        """Node features by side, the updates that are comparable across depth: (N, r, n) each. Zero for
        directions that selection has closed.
        """
        features = {side: self._feature(side, getattr(factors, side)) for side in self.sides}
        if self.kept is None:
            return features
        return {side: of_side * self.kept[..., None] for side, of_side in features.items()}

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


def coordinated_sides(kind: Kind, config: StructLoRAConfig) -> tuple[str, ...]:
    """The factors of a kind that message passing changes."""
    acts = config.coordinator != "none" and kind.depth_count > 1
    return compared_sides(kind, config) if acts else ()


def mapped_sides(kind: Kind, config: StructLoRAConfig) -> tuple[str, ...]:
    """Return the factors of a kind that its map changes."""
    mapped = {*coordinated_sides(kind, config), *(("B",) if config.keep is not None else ())}
    return tuple(side for side in kind.sides if side in mapped)


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
            "two depths or more of some kind for a coordinator, told by a number between dots, as in `layers.3.q_proj`",
            "adapt more layers (or name them so), or set `coordinator='none'`",
        )
    for kind in kinds:
        for side in mapped_sides(kind, config):
            if not getattr(kind, side)[0].requires_grad:
                remedy = (
                    "set `side='write'` or `coordinator='none'`"
                    if side == "A"
                    else "train it, or set `side='read'` (or `coordinator='none'`) and remove `keep`"
                )
                raise StructLoRAError(
                    f"lora_{side} of '{kind.name}' frozen",
                    f"a trainable lora_{side}, since StructLoRA maps it",
                    remedy,
                )
