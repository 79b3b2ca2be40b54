"""Slices of factors: ranks that share parameters each map a slice of the width, for all modules of a kind.

The map acts on depth and rank, and the width (k of A, d of B) is a batch to it. What sums over the width is
summed over ranks here.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce as all_reduce_with_gradient

AXIS = {"A": -1, "B": -2}  # of the width, in stacked factors


class Slices:
    """Which slice of one kind's factors each rank has.

    Args:
        group (`ProcessGroup`, *optional*): the ranks that share them; every rank has the whole where omitted.
        bounds (`dict[str, list[int]]`, *optional*): for side 'A' and 'B', n + 1 numbers: rank i of n has the
            entries from the i-th to the one before the next.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, bounds: dict[str, list[int]] | None = None):
        self.group, self.bounds = group, bounds

    @property
    def is_shared(self) -> bool:
        """Whether ranks have slices, and not the whole."""
        return self.group is not None

    def sum_with_gradient(self, x: Tensor) -> Tensor:
        """Sum of a tensor over the ranks; autograd goes through it."""
        return all_reduce_with_gradient(x, group=self.group) if self.is_shared else x

    def sum(self, x: Tensor) -> Tensor:
        """Sum of a tensor over the ranks, without autograd."""
        return self.sums([x])[0]

    def sums(self, parts: list[Tensor]) -> list[Tensor]:
        """Sums of several tensors over the ranks, in one collective and without autograd."""
        if not self.is_shared or not parts:
            return parts
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat, group=self.group)
        totals = flat.split([part.numel() for part in parts])
        return [total.view(part.shape) for total, part in zip(totals, parts, strict=True)]

    def every(self, condition: Tensor) -> Tensor:
        """Whether each entry of a bool tensor holds on every rank."""
        if not self.is_shared:
            return condition
        agreed = condition.int()
        dist.all_reduce(agreed, dist.ReduceOp.MIN, group=self.group)
        return agreed.bool()

    def whole(self, x: Tensor, side: str) -> Tensor:
        """All ranks' slices of stacked factors, joined along the width."""
        return join_slices([(self, x, side)])[0]

    def part(self, x: Tensor, side: str) -> Tensor:
        """This rank's slice of whole factors: the inverse of `whole`."""
        if not self.is_shared:
            return x
        start = self.bounds[side][dist.get_rank(self.group)]
        return x.narrow(AXIS[side], start, self.size(side))

    def size(self, side: str) -> int:
        """Width of this rank's slice, where ranks have slices."""
        return self.sizes(side)[dist.get_rank(self.group)]

    def sizes(self, side: str) -> list[int]:
        """Widths of all ranks' slices."""
        return [end - start for start, end in pairwise(self.bounds[side])]


WHOLE = Slices()

# Stacked factors of which each rank has a slice: whose slices, this rank's, which side.
Piece = tuple[Slices, Tensor, str]


def join_slices(pieces: list[Piece]) -> list[Tensor]:
    """Join the ranks' slices of several stacked factors, all of one dtype, in one all-gather."""
    if not pieces or not pieces[0][0].is_shared:
        return [x for _, x, _ in pieces]
    group = pieces[0][0].group
    ranks = dist.get_world_size(group)
    sizes = [slices.sizes(side) for slices, _, side in pieces]
    ours = [x.movedim(AXIS[side], 0) for _, x, side in pieces]
    # Padded to the widest slice, so that all ranks send alike.
    shapes = [(max(widths), *x.shape[1:]) for x, widths in zip(ours, sizes, strict=True)]
    counts = [math.prod(shape) for shape in shapes]
    sent = ours[0].new_zeros(sum(counts))
    for x, part, shape in zip(ours, sent.split(counts), shapes, strict=True):
        part.view(shape)[: len(x)] = x
    gathered = sent.new_empty(ranks * len(sent))
    dist.all_gather_into_tensor(gathered, sent, group=group)
    by_piece = gathered.view(ranks, -1).split(counts, dim=1)
    wholes = []
    for parts, shape, widths, (_, _, side) in zip(by_piece, shapes, sizes, pieces, strict=True):
        joined = torch.cat([part.view(shape)[:width] for part, width in zip(parts, widths, strict=True)])
        wholes.append(joined.movedim(0, AXIS[side]).contiguous())
    return wholes
