"""The width of factors (k of A, d of B), which ranks may share: each then has a slice of it, for all depths.

The map acts on depth and rank, and the width is a batch to it. What does sum over the width (norms, Gram matrices, cosines)
is asked for here, so that it is the same on every rank.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce as summed_with_gradient
from torch.nn.functional import pad

AXIS = {"A": -1, "B": -2}  # of the width, in stacked factors


class Width:
    """Who has which slice of one kind's factors.

    Args:
        group (`ProcessGroup`, *optional*): the ranks that share them; one process has the whole where omitted.
        bounds (`dict[str, list[int]]`, *optional*): for side 'A' and 'B', N + 1 numbers: rank i of N has the entries from
            the i-th to the one before the next.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, bounds: dict[str, list[int]] | None = None):
        self.group, self.bounds = group, bounds

    @property
    def is_shared(self) -> bool:
        return self.group is not None

    @property
    def count(self) -> int:
        """Ranks that share it."""
        return dist.get_world_size(self.group) if self.is_shared else 1

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks of what each has summed over its slice; autograd goes through it."""
        return summed_with_gradient(x, group=self.group) if self.is_shared else x

    def sums(self, parts: list[Tensor]) -> list[Tensor]:
        """The same of several tensors, in one collective and without autograd."""
        if not self.is_shared or not parts:
            return parts
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat, group=self.group)
        found = flat.split([part.numel() for part in parts])
        return [piece.view(part.shape) for piece, part in zip(found, parts, strict=True)]

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the last axis, the width: (..., n) -> (...)."""
        if not self.is_shared:
            return x.mean(-1)
        sums = self.sum(torch.cat([x.sum(-1).flatten(), x.new_tensor([x.shape[-1]])]))
        return (sums[:-1] / sums[-1]).view(x.shape[:-1])

    def peak(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        """Largest magnitude over some axes, which stay with size 1; 0 of nothing."""
        found = pad(x.abs(), (0, 1)).amax(axes, keepdim=True)
        if self.is_shared:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return found

    def every(self, condition: Tensor) -> Tensor:
        """Whether it holds on every rank, for each entry of a bool tensor."""
        if not self.is_shared:
            return condition
        found = condition.int()
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.group)
        return found.bool()

    def whole(self, x: Tensor, side: str) -> Tensor:
        """All ranks' slices of stacked factors, joined along the width."""
        if not self.is_shared:
            return x
        axis, sizes = AXIS[side], self._sizes(side)
        mine = x.movedim(axis, 0)
        filled = mine.new_zeros(max(sizes), *mine.shape[1:])
        filled[: len(mine)] = mine
        gathered = filled.new_empty(len(sizes) * len(filled), *mine.shape[1:])
        dist.all_gather_into_tensor(gathered, filled, group=self.group)
        pieces = [piece[:size] for piece, size in zip(gathered.split(len(filled)), sizes, strict=True)]
        return torch.cat(pieces).movedim(0, axis).contiguous()

    def part(self, x: Tensor, side: str) -> Tensor:
        """This rank's slice of a whole tensor: the inverse of `whole`."""
        if not self.is_shared:
            return x
        start = self.bounds[side][dist.get_rank(self.group)]
        return x.narrow(AXIS[side], start, self.size(side))

    def size(self, side: str) -> int:
        """Of this rank's slice, where ranks share the width."""
        return self._sizes(side)[dist.get_rank(self.group)]

    def _sizes(self, side: str) -> list[int]:
        return [end - start for start, end in pairwise(self.bounds[side])]


WHOLE = Width()
