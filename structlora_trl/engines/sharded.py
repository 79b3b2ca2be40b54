"""What the engines that shard parameters have in common: slices of the moved sides are kept, those of the others are read anew."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor, nn

from ..core.mapping import SIDES, Factors
from ..core.nodes import Kind
from .base import Engine
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

    def _move(self, moved: list[tuple[str, ...]]) -> None:
        """At `install`."""
        self._unmoved = [tuple(side for side in SIDES if side not in sides) for sides in moved]
        self._moved, self._last = Exchange(self.sharding, moved), None

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
        others = Exchange(self.sharding, self._unmoved).to_slices(self._master)
        return [
            Factors(*(getattr(other if side in sides else own, side) for side in SIDES))
            for own, other, sides in zip(self._slices, others, self._unmoved, strict=True)
        ]

    def read_working(self) -> list[Factors]:
        return self._everything().to_slices(self._working)

    def remove(self) -> None:
        # What the optimizer makes of the other sides from here on is no latent.
        self._last = self.read_latents(everything=True)

    def _everything(self) -> Exchange:
        return Exchange(self.sharding, [SIDES] * len(self.sharding.kinds))
