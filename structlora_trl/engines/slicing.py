"""From the fragments that ranks own to slices of the width, and back: one all-to-all for each side.

An engine shards each parameter as it likes: a rank owns a fragment of its flat values, which may begin in the
middle of a row. The map wants all depths of the same columns of A and rows of B. Which value goes where never
changes, so that the places are computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.expert_storage import to_nodes, to_storage
from ..core.kinds import SIDES, Factors, Kind
from .slices import Slices

Reader = Callable[[nn.Parameter], Tensor]  # a parameter -> the values of this rank's fragment


class Sharding:
    """Who owns what of some kinds' factors.

    Args:
        kinds (`list[Kind]`): whose factors.
        group (`ProcessGroup`): the ranks that share them.
        span (`Callable`): parameter -> (start, stop) of this rank's fragment of its flat values.

    Attributes:
        slices (`list[Slices]`): one per kind, the slices that each rank has.
    """

    def __init__(
        self, kinds: list[Kind], group: dist.ProcessGroup, span: Callable[[nn.Parameter], tuple[int, int]]
    ):
        self.kinds, self.group, self.span, self.device = kinds, group, span, kinds[0].device
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        own = torch.tensor(
            [span(p) for kind in kinds for p in kind.parameters], dtype=torch.int64, device=self.device
        )
        everyone = own.new_empty(self.ranks * len(own), 2)
        dist.all_gather_into_tensor(everyone, own, group=group)
        self._spans = everyone.view(self.ranks, -1, 2).cpu()  # (N, parameters, 2)
        self.slices = [
            Slices(group, {side: self._bounds(i, side) for side in SIDES}) for i in range(len(kinds))
        ]

    def spans(self, place: int, side: str) -> Tensor:
        """All ranks' fragments of a kind's factors on one side: (L, N, 2)."""
        kind = self.kinds[place]
        start = sum(len(other.A) + len(other.B) for other in self.kinds[:place])
        start += len(kind.A) if side == "B" else 0
        return self._spans[:, start : start + len(getattr(kind, side))].transpose(0, 1)

    def shape(self, place: int, side: str) -> tuple[int, int]:
        """Shape of one stored factor: (rows, columns)."""
        _, rank, k, d = self.kinds[place].shape
        return (rank, k) if side == "A" else (d, rank)

    def slice_shape(self, place: int, side: str) -> tuple[int, int, int]:
        """Shape of this rank's slice of stacked factors, as PEFT stores them."""
        bounds = self.slices[place].bounds[side]
        size = bounds[self.rank + 1] - bounds[self.rank]
        rows, columns = self.shape(place, side)
        return (len(self.kinds[place].modules), *((rows, size) if side == "A" else (size, columns)))

    def _bounds(self, place: int, side: str) -> list[int]:
        """Shares of the width, as `torch.chunk` deals them; of lora_B the rows that ranks own already, where
        all depths have the same ones.
        """
        rows, columns = self.shape(place, side)
        width = columns if side == "A" else rows
        spans = self.spans(place, side)
        if side == "B" and bool((spans == spans[:1]).all()):
            starts = [-(-int(start) // columns) if stop > start else None for start, stop in spans[0]]
            bounds = [width]
            for start in reversed(starts):
                bounds.insert(0, bounds[0] if start is None else start)
            return bounds
        share = -(-width // self.ranks)
        return [min(rank * share, width) for rank in range(self.ranks + 1)]


class Exchange:
    """Moves factors of some sides between fragments and slices. To build one is a collective, as its verbs.

    Args:
        sharding (`Sharding`): who owns what.
        sides (`list[tuple[str, ...]]`): for each kind, the sides to move.
    """

    def __init__(self, sharding: Sharding, sides: list[tuple[str, ...]]):
        self.sharding, self.sides = sharding, sides
        places = {side: [i for i, chosen in enumerate(sides) if side in chosen] for side in SIDES}
        self._each = {side: _Side(sharding, side, chosen) for side, chosen in places.items() if chosen}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters whose values are moved."""
        return [p for side in self._each.values() for p in side.parameters]

    @torch.no_grad()
    def to_slices(self, of: Reader) -> list[Factors]:
        """This rank's slices of nodes, fp32, from all fragments; empty on the sides that are not moved."""
        stored = {name: side.to_slices(of) for name, side in self._each.items()}
        kinds = self.sharding.kinds
        return [
            Factors(
                *(to_nodes(stored.get(side, {}).get(i, self._empty(i, side)), side, kind) for side in SIDES)
            )
            for i, kind in enumerate(kinds)
        ]

    @torch.no_grad()
    def to_fragments(self, slices: list[Factors]) -> list[tuple[nn.Parameter, Tensor]]:
        """This rank's fragments, flat and fp32, from all slices."""
        return [pair for side in self._each.values() for pair in side.to_fragments(slices)]

    def _empty(self, place: int, side: str) -> Tensor:
        depths, rows, columns = self.sharding.slice_shape(place, side)
        shape = (depths, rows, 0) if side == "A" else (depths, 0, columns)
        return torch.empty(shape, dtype=torch.float32, device=self.sharding.device)


class _Side:
    """One side of an exchange.

    Args:
        places (`list[int]`): of the kinds.
    """

    def __init__(self, sharding: Sharding, side: str, places: list[int]):
        self.sharding, self.side, self.places = sharding, side, places
        factors = [getattr(sharding.kinds[i], side) for i in places]
        alike = all(bool((s == s[:1]).all()) for s in (sharding.spans(i, side) for i in places))
        # If every depth is sharded alike, indices are computed once; of experts, for all at one depth.
        self.rows = math.gcd(*map(len, factors)) if alike else 1
        self.parameters = [
            p
            for row in range(self.rows)
            for parameters in factors
            for p in parameters[row * len(parameters) // self.rows : (row + 1) * len(parameters) // self.rows]
        ]
        # Of this rank's fragments.
        self._sizes = [stop - start for start, stop in map(sharding.span, self.parameters)]
        self._place()

    def _place(self) -> None:
        """Where each value goes to and comes from."""
        sharding, targets, sources = self.sharding, [], []
        for place in self.places:
            rows, columns = sharding.shape(place, self.side)
            bounds = torch.tensor(sharding.slices[place].bounds[self.side], dtype=torch.int64, device="cpu")
            start, end = (int(bounds[sharding.rank + i]) for i in (0, 1))
            if self.side == "A":
                sliced = (_arange(0, rows)[:, None] * columns + _arange(start, end)).flatten()
            else:
                sliced = _arange(start * columns, end * columns)
            spans = sharding.spans(place, self.side)
            for of_depth in spans[: len(spans) // self.rows]:
                own = _arange(*of_depth[sharding.rank].tolist())
                along = own % columns if self.side == "A" else own // columns
                targets.append(torch.searchsorted(bounds[1:], along, right=True))
                owners = (of_depth[:, 1] > of_depth[:, 0]).nonzero().flatten()
                owners = owners[of_depth[owners, 0].argsort()]
                sources.append(
                    owners[torch.searchsorted(of_depth[owners, 0].contiguous(), sliced, right=True) - 1]
                )
        targets, sources = torch.cat(targets), torch.cat(sources)
        self._sent, self._received = (
            found.bincount(minlength=sharding.ranks).tolist() for found in (targets, sources)
        )
        # Ordered by rank, and within a rank by place: sender and receiver see the same order.
        self._by_target = targets.argsort(stable=True).to(sharding.device)
        self._by_source = sources.argsort(stable=True).to(sharding.device)
        leaving = torch.tensor(
            len(targets) - self._sent[sharding.rank], dtype=torch.int64, device=sharding.device
        )
        dist.all_reduce(leaving, dist.ReduceOp.MAX, group=sharding.group)
        self._is_local = not bool(leaving)  # fragments are slices already

    def to_slices(self, of: Reader) -> dict[int, Tensor]:
        """This rank's slices, as PEFT stores them, by place of the kind."""
        device = self.sharding.device
        flat = torch.cat([of(p).reshape(-1).to(device, torch.float32) for p in self.parameters]).view(
            self.rows, -1
        )
        if not self._is_local:
            flat = self._moved(flat, self._by_target, self._sent, self._by_source, self._received)
        shapes = [self.sharding.slice_shape(i, self.side) for i in self.places]
        pieces = flat.split([math.prod(shape) // self.rows for shape in shapes], dim=1)
        return {i: piece.reshape(shape) for i, piece, shape in zip(self.places, pieces, shapes, strict=True)}

    def to_fragments(self, slices: list[Factors]) -> list[tuple[nn.Parameter, Tensor]]:
        stored = (
            to_storage(getattr(slices[i], self.side), self.side, self.sharding.kinds[i]) for i in self.places
        )
        flat = torch.cat([factors.reshape(self.rows, -1) for factors in stored], dim=1)
        if not self._is_local:
            flat = self._moved(flat, self._by_source, self._received, self._by_target, self._sent)
        return list(zip(self.parameters, flat.reshape(-1).split(self._sizes), strict=True))

    def _moved(
        self, flat: Tensor, leaving: Tensor, sent: list[int], arriving: Tensor, received: list[int]
    ) -> Tensor:
        """(rows, mine) -> (rows, mine): each entry to the rank that wants it."""
        outgoing = flat.T.index_select(0, leaving)
        incoming = outgoing.new_empty(len(arriving), self.rows)
        dist.all_to_all_single(incoming, outgoing, received, sent, group=self.sharding.group)
        found = flat.new_empty(self.rows, len(arriving))
        found.T.index_copy_(0, arriving, incoming)
        return found


def _arange(start: int, stop: int) -> Tensor:
    return torch.arange(start, stop, dtype=torch.int64, device="cpu")
