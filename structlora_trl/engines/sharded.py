"""What the engines that shard parameters have in common: slices of the moved sides are kept, those of the others are read anew."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor, nn

from ..core.mapping import SIDES, Factors
from ..core.nodes import Kind
from .base import Engine
from .rows import RowExchange
from .slicing import Exchange, Sharding


class ShardedEngine(Engine):
    """An engine whose ranks own fragments of each parameter."""

    def _shard(
        self, kinds: list[Kind], group: dist.ProcessGroup, span: Callable[[nn.Parameter], tuple[int, int]]
    ) -> None:
        """Before anything else; see `Sharding`."""
        self.sharding = Sharding(kinds, group, span)
        self.widths = self.sharding.widths
        self._slices: list[Factors] = []  # latent factors of the moved sides
        self._last: list[Factors] | None = None  # all latent factors as they were at `remove`

    def _move(self, moved: list[tuple[str, ...]], by_row: list[bool]) -> None:
        """At `install`."""
        self._unmoved = _others(moved)
        self._moved = RowExchange(self.sharding, moved, by_row) if any(by_row) else Exchange(self.sharding, moved)
        self.rows, self._last = self._moved.rows, None

    def _master(self, parameter: nn.Parameter) -> Tensor:
        """This rank's fragment of the latent values, on sides that are not moved."""
        raise NotImplementedError

    def _working(self, parameter: nn.Parameter) -> Tensor:
        """This rank's fragment of what the model computes with."""
        raise NotImplementedError

    def read_latents(self, everything: bool = False) -> list[Factors]:
        if not everything:
            return self._slices
        if self._last is not None:
            return self._last
        rows = dict(self._moved.row_fragments(self._slices)) if any(self.rows) else {}
        apart = _others(self._moved.sides)
        others = Exchange(self.sharding, apart).to_slices(lambda p: rows[p] if p in rows else self._master(p))
        return [
            Factors(*(getattr(other if side in sides else own, side) for side in SIDES))
            for own, other, sides in zip(self._slices, others, apart, strict=True)
        ]

    def read_working(self) -> list[Factors]:
        return self._everything().to_slices(self._working)

    def remove(self) -> None:
        # What the optimizer makes of the other sides from here on is no latent.
        self._last = self.read_latents(everything=True)

    def _everything(self) -> Exchange:
        return Exchange(self.sharding, [SIDES] * len(self.sharding.kinds))


def _others(given: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The sides that are not given."""
    return [tuple(side for side in SIDES if side not in sides) for sides in given]
