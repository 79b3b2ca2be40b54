"""Smaller adapters tried on rows: what their directions are worth, what they learn, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from .base_model import base_is_beneath, load_base, on_base, put, with_base
from .distilling import Distilled, distil
from .load_adapter import Saved
from .measuring import Losses, Scaled, choose_scale, gate_information, mean_loss
from .peft_scaling import rank_of, with_singular_directions
from .pruning import Pruned, select, shrink
from .rows import Rows, read_rows

TELL = 64  # rows of the data that tell which directions to keep, and most on which the loss is measured
_SHARES = [2.0**-i for i in reversed(range(7))]  # sizes at which the loss is measured


class Trial:
    """The base model with the adapter on it, loaded when it is first asked for: what directions are worth on
    some rows, and what smaller ones do to the loss.

    Smaller adapters take the place of the whole one's factors in the one model, with zeros for what they lack.

    Args:
        saved (`Saved`): the adapter, as it loads onto its base model (`with_base`).
        base_name, revision (`str`, *optional*): of the base model.
        rows (`Rows`, *optional*): to measure on; without any, nothing is.
        is_chosen (`bool`): True if rows choose directions, or teach: the loss is of others then, and directions
            are the singular ones of each update.

    Attributes:
        whole (`dict[str, Tensor]`): the adapter's file, in these directions.
        measured (`list[dict[str, Tensor]]`): rows that the loss is of, and `measured_on` a name for them.
    """

    def __init__(
        self, saved: Saved, base_name: str | None, revision: str | None, rows: Rows | None, is_chosen: bool
    ):
        self._saved, self._base, self.rows = saved, (base_name, revision), rows
        self.whole = with_singular_directions(saved.lora, saved.tensors)[0] if is_chosen else saved.tensors
        self.measured, self.measured_on = rows.rows if rows else [], ""
        if rows:
            others = rows.rows[TELL : 2 * TELL] if is_chosen else []
            self.measured = others or rows.rows
            which = "other " if others else "the same " if is_chosen else ""
            self.measured_on = f"{len(self.measured)} {which}rows"

    @cached_property
    def model(self) -> PeftModel:
        """The whole adapter on its base model."""
        name, revision = self._base
        place = "auto" if torch.accelerator.is_available() else None
        base = load_base(name, self._saved.lora, self._saved.tensors, revision, device_map=place)
        model = on_base(base, self._saved.lora, self.whole)
        put(model, self.whole)  # which looks at the names, too
        return model

    @cached_property
    def information(self) -> dict[str, Tensor] | None:
        """`gate_information` of the whole adapter; None without rows."""
        return gate_information(self.model, self.rows.rows[:TELL]) if self.rows else None

    def distilled(self, small: dict[str, Tensor], steps: int) -> Distilled:
        """`distil` an adapter of the whole one's shapes, on rows that the loss is not measured on."""
        rows = self.rows.rows
        learned = [*rows[:TELL], *rows[2 * TELL :]] if len(rows) > TELL else rows
        return distil(self.model, self.whole, small, learned, steps)

    def scaled(self, tensors: dict[str, Tensor]) -> Scaled:
        """`choose_scale` for an adapter of the whole one's shapes."""
        return choose_scale(self.model, tensors, self.measured, self.measured_on)

    def loss(self, tensors: dict[str, Tensor]) -> float | None:
        """Mean loss with an adapter of the whole one's shapes; None without labels."""
        put(self.model, tensors)
        return mean_loss(self.model, self.measured)

    @cached_property
    def base_loss(self) -> float | None:
        """Mean loss of the base model alone, where it can be had from the loaded one."""
        if not base_is_beneath(self._saved.lora):
            return None
        with self.model.disable_adapter():
            return mean_loss(self.model, self.measured)

    @cached_property
    def _whole_loss(self) -> float | None:
        return self.loss(self.whole)

    def losses(self, final: dict[str, Tensor], cut: dict[str, Tensor] | None) -> Losses | None:
        """Losses of a smaller adapter, and of the same before it was taught or scaled; None without rows or labels."""
        if self.rows is None or self._whole_loss is None:
            return None
        before = None if cut is None else self.loss(cut)
        return Losses(self.base_loss, self._whole_loss, self.loss(final), before, self.measured_on)


class SizeCurve(NamedTuple):
    """What a smaller adapter keeps of one thing: points (share of directions, value) by their order, and
    values to compare with, by name.
    """

    value: str
    orders: dict[str, list[tuple[float, float]]]
    levels: dict[str, float] = {}  # noqa: RUF012 - of a tuple, never written to


def information_curves(
    saved: Saved, data: str | Path | Sequence[dict] | None, base: str | None = None, split: str | None = None
) -> list[SizeCurve]:
    """What smaller adapters would keep at each size: of the information, and the loss: over the whole model
    (`select`), by information, by openness where there are gates, and by neither, and with one rank for all modules
    (`shrink`). Information is of singular directions, and not of those that openness chooses from.

    Args:
        saved (`Saved`): any adapter.
        data, split, base: as for `export`.

    Raises:
        StructLoRAError: as for `export`.
    """
    saved, base_name, revision = with_base(saved, base)
    rows = read_rows(data, saved, base_name, revision, 2 * TELL, split)
    trial = Trial(saved, base_name, revision, rows, is_chosen=True)
    information = trial.information
    directions = sum(x.numel() for x in information.values())
    largest = max(rank_of(saved.lora, module) for module in information)
    ranks = sorted({max(1, round(share * largest)) for share in _SHARES})
    ungated = replace(saved, openness=None)
    orders = {
        "most information": (partial(select, ungated, information=information), _SHARES),
        "norm": (partial(select, ungated), _SHARES),
        "one rank for all modules": (partial(shrink, ungated), ranks),
    }
    if saved.openness:
        orders["openness"] = (partial(select, saved), _SHARES)
    carried, losses = {}, {name: [] for name in orders}
    for name, (make, sizes) in orders.items():
        for size in sizes:
            pruned = make(size)
            share = pruned.count / directions
            losses[name].append((share, trial.loss(pruned.masked())))
            if name != "openness":
                carried.setdefault(name, [(0.0, 0.0)]).append((share, _carried(pruned, information)))
    levels = {} if trial.base_loss is None else {"base model": trial.base_loss}
    return [SizeCurve("share of the information", carried), SizeCurve("loss", losses, levels)]


def _carried(pruned: Pruned, information: dict[str, Tensor]) -> float:
    """Which share of the information the directions kept carry."""
    kept = sum(information[module][mask].sum() for module, mask in pruned.kept.items())
    return float(kept / sum(x.sum() for x in information.values()))
