"""Sharded factors in one flat vector, so that reading all of them costs one collective, whatever their number.

Every rank owns a fragment of some parameters. It lays its fragments into a vector of zeros that has room for all factors of
all kinds, and the sum over ranks is the whole. Writing needs no collective: each rank takes its fragments out again.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.mapping import Factors
from ..core.nodes import Kind, full_shape


class Fragment(NamedTuple):
    """Where a rank's part of one parameter lies in the flat vector, and which values it has there."""

    start: int
    values: Tensor  # flat


def holds_nonfinite(tensors: list[Tensor], device: torch.device) -> Tensor:
    """1.0 where some tensor holds NaN or Inf, else 0.0; on `device`, without waiting for it."""
    # The largest magnitude: in fp16, a 2-norm overflows where every element is finite.
    peaks = torch._foreach_norm([tensor for tensor in tensors if tensor.numel()], math.inf)
    if not peaks:
        return torch.zeros((), device=device)
    return 1 - torch.stack([peak.to(device).isfinite() for peak in peaks]).all().float()


class Packing:
    """The layout of the flat vector: per kind all of A, then all of B, each contiguous over depth.

    Args:
        kinds (`list[Kind]`): whose factors.
        group (`ProcessGroup`): the ranks that share them.
    """

    def __init__(self, kinds: list[Kind], group: dist.ProcessGroup | None):
        self.kinds, self.group = kinds, group
        self.offsets: dict[int, int] = {}
        self.collectives = 0
        size = 0
        for kind in kinds:
            for parameter in (*kind.A, *kind.B):
                self.offsets[id(parameter)] = size
                size += full_shape(parameter).numel()
        self.size, self.device = size, kinds[0].device

    def offset(self, parameter: nn.Parameter) -> int:
        """Where the parameter begins."""
        return self.offsets[id(parameter)]

    @torch.no_grad()
    def gather(self, fragments: list[Fragment]) -> list[Factors]:
        """Whole factors from every rank's fragments; a collective."""
        return self.gather_with(fragments, torch.zeros((), device=self.device))[0]

    @torch.no_grad()
    def gather_with(self, fragments: list[Fragment], figure: Tensor) -> tuple[list[Factors], Tensor]:
        """The same, and the sum over ranks of one more figure, in the same collective."""
        flat = torch.zeros(self.size + 1, device=self.device)
        for start, values in fragments:
            flat[start : start + values.numel()].copy_(values)
        flat[-1] = figure
        dist.all_reduce(flat, group=self.group)
        self.collectives += 1
        return self.unpack(flat), flat[-1]

    def unpack(self, flat: Tensor) -> list[Factors]:
        """Views of a flat vector as stacked factors."""
        factors, start = [], 0
        for kind in self.kinds:
            depth_count, rank, k, d = kind.shape
            middle, end = start + depth_count * rank * k, start + depth_count * rank * (k + d)
            factors.append(
                Factors(flat[start:middle].view(depth_count, rank, k), flat[middle:end].view(depth_count, d, rank))
            )
            start = end
        return factors

    def pack(self, factors: list[Factors]) -> Tensor:
        """Stacked factors as one flat vector."""
        return torch.cat([part.reshape(-1).to(self.device) for kind in factors for part in kind])

    @torch.no_grad()
    def scatter(self, factors: list[Factors], fragments: list[Fragment]) -> None:
        """Copy each fragment's part of the factors into it."""
        flat = self.pack(factors)
        for start, values in fragments:
            values.copy_(flat[start : start + values.numel()])
