"""Where gates alone act on lora_B, each rank maps the rows that it owns: nothing moves until the model is to have them all.

Under ZeRO-1 and 2 a rank owns whole layers, and a fragment of one where its share begins or ends. Slices of the width would take
an all-to-all each way; rows do not, since a gate multiplies a column of lora_B whatever the row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from ..core.mapping import SIDES, Factors
from .base import copy_values
from .slicing import Exchange, Reader, Sharding

GATHERED_BYTES = 2**25  # of whole factors, in one collective


class _Piece(NamedTuple):
    """Bytes that arrive from a rank, and where they go to: of which parameter, from where on."""

    parameter: int
    start: int
    rank: int
    arrival: int
    size: int


class RowExchange(Exchange):
    """An exchange that leaves some kinds' lora_B where it is: its place among the slices is taken by rows of it, (R, 1, r), of
    all depths that this rank owns something of. A row that it owns in part is filled up with zeros.

    Args:
        sharding, sides: as of `Exchange`.
        by_row (`list[bool]`): the kinds whose lora_B stays, at least one.
    """

    def __init__(self, sharding: Sharding, sides: list[tuple[str, ...]], by_row: list[bool]):
        travelling = [
            tuple(side for side in given if not (stays and side == "B"))
            for given, stays in zip(sides, by_row, strict=True)
        ]
        super().__init__(sharding, travelling)
        self._own = {place: _OwnRows(sharding, place) for place, stays in enumerate(by_row) if stays}
        self.rows = [self._own[place].counts if stays else None for place, stays in enumerate(by_row)]
        in_bytes = [sharding.spans(place, "B") * sharding.kinds[place].B[0].element_size() for place in self._own]
        self._step, self._lots = _lots(torch.cat(in_bytes).transpose(0, 1).tolist())

    @property
    def parameters(self) -> list[nn.Parameter]:
        return super().parameters + self._row_parameters

    @torch.no_grad()
    def to_slices(self, of: Reader) -> list[Factors]:
        found = super().to_slices(of)
        return [f._replace(B=self._own[i].read(of)) if i in self._own else f for i, f in enumerate(found)]

    def to_fragments(self, slices: list[Factors], sides: tuple[str, ...] = SIDES) -> list[tuple[nn.Parameter, Tensor]]:
        return super().to_fragments(slices, sides) + (self.row_fragments(slices) if "B" in sides else [])

    @torch.no_grad()
    def row_fragments(self, slices: list[Factors]) -> list[tuple[nn.Parameter, Tensor]]:
        """Of the rows alone; no collective."""
        return [pair for place, own in self._own.items() for pair in own.fragments(slices[place].B)]

    @torch.no_grad()
    def put_rows_everywhere(self, slices: list[Factors]) -> None:
        """Write everyone's rows into the parameters, which are whole on every rank; a collective. All kinds together, since
        ranks own about the same of all of them, and not of one."""
        own = torch.cat([value.to(p.dtype).view(torch.uint8) for p, value in self.row_fragments(slices)])
        whole = [p.data.view(-1).view(torch.uint8) for p in self._row_parameters]
        for lot, (size, pieces) in enumerate(self._lots):
            sent = own[lot * self._step :][:size]
            everyone = sent.new_empty(self.sharding.ranks * size)
            dist.all_gather_into_tensor(everyone, pad(sent, (0, size - len(sent))), group=self.sharding.group)
            targets = [whole[piece.parameter].narrow(0, piece.start, piece.size) for piece in pieces]
            copy_values(targets, [everyone.narrow(0, p.rank * size + p.arrival, p.size) for p in pieces])

    @property
    def _row_parameters(self) -> list[nn.Parameter]:
        return [p for place in self._own for p in self.sharding.kinds[place].B]


class _OwnRows:
    """The rows of one kind's lora_B that this rank owns.

    Attributes:
        counts (`list[int]`): how many are of each depth.
    """

    def __init__(self, sharding: Sharding, place: int):
        self._parameters, self._device = sharding.kinds[place].B, sharding.device
        _, self._columns = sharding.shape(place, "B")
        spans = sharding.spans(place, "B")[:, sharding.rank].tolist()
        # Entries that fill up the first and the last row of each depth.
        self._margins = [
            (start % self._columns, -stop % self._columns) if start < stop else (0, 0) for start, stop in spans
        ]
        self.counts = [
            (front + stop - start + back) // self._columns
            for (front, back), (start, stop) in zip(self._margins, spans, strict=True)
        ]

    def read(self, of: Reader) -> Tensor:
        """(R, 1, r), fp32."""
        fragments = [of(p).reshape(-1).to(self._device, torch.float32) for p in self._parameters]
        filled = [pad(f, margin) if any(margin) else f for f, margin in zip(fragments, self._margins, strict=True)]
        return torch.cat(filled).view(sum(self.counts), 1, self._columns)

    def fragments(self, rows: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """Flat, fp32."""
        return [
            (p, of_depth.reshape(-1)[front : of_depth.numel() - back])
            for p, of_depth, (front, back) in zip(self._parameters, rows.split(self.counts), self._margins, strict=True)
        ]


def _lots(owned: list[list[tuple[int, int]]]) -> tuple[int, list[tuple[int, list[_Piece]]]]:
    """How ranks' bytes are gathered: as many at once as `GATHERED_BYTES`.

    Args:
        owned (`list`): for each rank, the first byte and the one after the last of each parameter.

    Returns:
        What a rank sends at most in one collective, and for each of them what it sends and the pieces that arrive.
    """
    share = max(sum(stop - start for start, stop in of_rank) for of_rank in owned)
    step = max(1, min(share, GATHERED_BYTES // len(owned)))
    lots = [(min(step, share - begin), []) for begin in range(0, share, step)]
    for rank, of_rank in enumerate(owned):
        sent = 0
        for parameter, (start, stop) in enumerate(of_rank):
            while start < stop:
                lot, arrival = divmod(sent, step)
                size = min(stop - start, step - arrival)
                lots[lot][1].append(_Piece(parameter, start, rank, arrival, size))
                start, sent = start + size, sent + size
    return step, lots
