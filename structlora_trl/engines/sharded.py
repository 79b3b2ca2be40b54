"""What engines that shard parameters share: slices of mapped sides are kept, others are read anew."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import nn

from ..core.kinds import SIDES, Factors, Kind
from .base import Engine
from .slicing import Exchange, Sharding


class ShardedEngine(Engine):
    """An engine whose ranks own fragments of each parameter.

    Subclasses have `_master(parameter)`, this rank's fragment of the latent values on sides that are not mapped,
    and `_working(parameter)`, its fragment of what the model computes with.
    """

    def _shard(
        self, kinds: list[Kind], group: dist.ProcessGroup, span: Callable[[nn.Parameter], tuple[int, int]]
    ) -> None:
        """Find out which rank owns what, before anything else; see `Sharding`."""
        self.sharding = Sharding(kinds, group, span)
        self.slices = self.sharding.slices
        self._latent_slices: list[Factors] = []  # of the mapped sides
        self._last: list[Factors] | None = None  # all latent factors as they were at `remove`

    def install(
        self,
        before_step: Callable[[], bool],
        after_step: Callable[[bool], None],
        mapped: list[tuple[str, ...]],
    ) -> None:
        self._unmapped = [
            tuple(side for side in kind.sides if side not in sides)
            for kind, sides in zip(self.sharding.kinds, mapped, strict=True)
        ]
        self._mapped = Exchange(self.sharding, mapped)
        self._last = None
        super().install(before_step, after_step, mapped)

    def read_latents(self, everything: bool = False) -> list[Factors]:
        if not everything:
            return self._latent_slices
        if self._last is not None:
            return self._last
        others = Exchange(self.sharding, self._unmapped).to_slices(self._master)
        return [
            Factors(*(getattr(other if side in sides else own, side) for side in SIDES))
            for own, other, sides in zip(self._latent_slices, others, self._unmapped, strict=True)
        ]

    def read_working(self) -> list[Factors]:
        return self._everything().to_slices(self._working)

    def remove(self) -> None:
        # What the optimizer makes of the other sides from here on is no latent.
        self._last = self.read_latents(everything=True)
        super().remove()

    def _everything(self) -> Exchange:
        return Exchange(self.sharding, [kind.sides for kind in self.sharding.kinds])
