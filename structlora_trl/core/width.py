"""The width of factors (k of A, d of B), which ranks may share: each then has a slice of it, for all depths.

The map acts on depth and rank, and the width is a batch to it. What does sum over the width (norms, Gram matrices, cosines)
is asked for here, so that it is the same on every rank.
"""

from __future__ import annotations

import math
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
        return whole_of([(self, x, side)])[0]

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

# Stacked factors of which each rank has a slice: whose width, this rank's slice, which side.
Piece = tuple[Width, Tensor, str]


def whole_of(pieces: list[Piece]) -> list[Tensor]:
    """`Width.whole` of several stacked factors, of one dtype, in one collective."""
    if not pieces or not pieces[0][0].is_shared:
        return [x for _, x, _ in pieces]
    ranks, group = pieces[0][0].count, pieces[0][0].group
    sizes = [width._sizes(side) for width, _, side in pieces]
    ours = [x.movedim(AXIS[side], 0) for _, x, side in pieces]
    shapes = [(max(given), *x.shape[1:]) for x, given in zip(ours, sizes, strict=True)]  # filled up, alike on all ranks
    counts = [math.prod(shape) for shape in shapes]
    sent = ours[0].new_zeros(sum(counts))
    for x, part, shape in zip(ours, sent.split(counts), shapes, strict=True):
        part.view(shape)[: len(x)] = x
    gathered = sent.new_empty(ranks * len(sent))
    dist.all_gather_into_tensor(gathered, sent, group=group)
    wholes = []
    for parts, shape, given, (_, _, side) in zip(
        gathered.view(ranks, -1).split(counts, dim=1), shapes, sizes, pieces, strict=True
    ):
        joined = torch.cat([part.view(shape)[:size] for part, size in zip(parts, given, strict=True)])
        wholes.append(joined.movedim(0, AXIS[side]).contiguous())
    return wholes
