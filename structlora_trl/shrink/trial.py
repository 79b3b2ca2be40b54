"""Smaller adapters tried on rows: what their directions are worth, what they learn, and what they cost."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from .base_model import base_is_beneath, in_dtype, load_base, on_base, put, with_base, write_adapter
from .distilling import Distilled, distil
from .export_options import NO_PROBE
from .load_adapter import Saved
from .measuring import (
    Change,
    Losses,
    Outputs,
    Probe,
    Scaled,
    change_of,
    choose_scale,
    gate_information,
    outputs_of,
    text_probe,
)
from .peft_scaling import rank_of, with_singular_directions
from .pruning import Pruned, select, shrink
from .rows import Rows, read_rows

TELL = 64  # rows of the data that tell which directions to keep, and most on which the loss is measured
_SHARES = [2.0**-i for i in reversed(range(7))]  # sizes at which the loss is measured


class Trial:
    """The base model with the adapter on it, loaded when it is first asked for: what directions are worth on
    some rows, and what smaller ones do to the output.

    Smaller adapters take the place of the whole one's factors in the one model, with zeros for what they lack.

    Args:
        saved (`Saved`): the adapter, as it loads onto its base model (`with_base`).
        base_name, revision (`str`, *optional*): of the base model.
        rows (`Rows`, *optional*): what the loss is measured on. Where they choose or teach, the next 64 after the first.
        probe (`str`): what the change of the output is measured on where there are no rows.
        scratch (`Path`): a folder for files that nobody keeps.
        is_chosen (`bool`): whether rows choose directions, or teach: the loss is of others then, and directions
            are the singular ones of each update.

    Attributes:
        whole (`dict[str, Tensor]`): the adapter's file, in these directions.
    """

    def __init__(
        self,
        saved: Saved,
        base_name: str | None,
        revision: str | None,
        rows: Rows | None,
        probe: str,
        scratch: Path,
        is_chosen: bool,
    ):
        self._saved, self._base = saved, (base_name, revision)
        self._rows, self._named, self._scratch, self._is_chosen = rows, probe, scratch, is_chosen
        self.whole = with_singular_directions(saved.lora, saved.tensors)[0] if is_chosen else saved.tensors
        self._probe: Probe | None = None
        self._before: Outputs | None = None
        self._alone: float | None = None

    @cached_property
    def model(self) -> PeftModel:
        """The whole adapter on its base model."""
        folder = self._scratch / "whole"
        write_adapter(folder, self._saved.lora, self.whole)
        name, revision = self._base
        place = "auto" if torch.accelerator.is_available() else None
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of weights that no file holds: the same ones each time
            base = load_base(name, self._saved.lora, self._saved.tensors, revision, device_map=place)
        if self._rows is None:
            self._probe = text_probe(base, name, revision, self._named, self._saved.lora)
        else:
            self._probe = _held_out(self._rows, self._is_chosen)
        model = on_base(base, folder)
        put(model, self.whole)  # which looks at the names, too
        return model

    @cached_property
    def information(self) -> dict[str, Tensor] | None:
        """`gate_information` of the whole adapter; None without rows."""
        return None if self._rows is None else gate_information(self.model, self._rows.rows[:TELL])

    def distilled(self, small: dict[str, Tensor], steps: int) -> tuple[dict[str, Tensor], Distilled]:
        """`small`, of the whole one's shapes, after `distil` on rows that the loss is not measured on."""
        rows = self._rows.rows
        learned = [*rows[:TELL], *rows[2 * TELL :]] if len(rows) > TELL else rows
        found = distil(self.model, self.whole, small, learned, steps)
        return found.tensors, found

    def scaled(self, tensors: dict[str, Tensor]) -> Scaled:
        """What `choose_scale` finds for an adapter of the whole one's shapes."""
        return choose_scale(self.model, tensors, self._probe)  # the model's loading makes the probe

    def change(
        self, cut: dict[str, Tensor], taught: dict[str, Tensor] | None, dtype: str | None
    ) -> Change | None:
        """What a smaller adapter does, as its file will have it; None where nothing is measured."""
        if self._rows is None and self._named == NO_PROBE:
            return None
        model = self.model
        if self._before is None:
            put(model, self.whole)
            self._before = outputs_of(model, self._probe.rows)
            if self._before.loss is not None and base_is_beneath(self._saved.lora):
                with model.disable_adapter():
                    self._alone = outputs_of(model, self._probe.rows).loss
        found = []
        for tensors in (cut, taught):
            if tensors is not None:
                put(model, in_dtype(tensors, dtype))
                found.append(outputs_of(model, self._probe.rows))
        losses = None
        if self._before.loss is not None:
            at_cut = found[0].loss if len(found) > 1 else None
            losses = Losses(self._alone, self._before.loss, found[-1].loss, at_cut)
        return change_of(self._probe.name, self._before, found[-1], losses)


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
    with tempfile.TemporaryDirectory() as scratch:
        trial = Trial(saved, base_name, revision, rows, NO_PROBE, Path(scratch), is_chosen=True)
        information = trial.information
    measured, directions = _held_out(rows, is_chosen=True).rows, sum(x.numel() for x in information.values())
    largest = max(rank_of(saved.lora, module) for module in information)
    ungated = replace(saved, openness=None)
    orders = {
        "most information": (partial(select, ungated, information=information), _SHARES),
        "norm": (partial(select, ungated), _SHARES),
        "one rank for all modules": (
            partial(shrink, ungated),
            sorted({max(1, round(share * largest)) for share in _SHARES}),
        ),
    }
    if saved.openness:
        orders["openness"] = (partial(select, saved), _SHARES)
    carried, losses = {}, {name: [] for name in orders}
    for name, (make, sizes) in orders.items():
        for size in sizes:
            pruned = make(size)
            share = pruned.count / directions
            put(trial.model, pruned.masked())
            losses[name].append((share, outputs_of(trial.model, measured).loss))
            if name != "openness":
                carried.setdefault(name, [(0.0, 0.0)]).append((share, _carried(pruned, information)))
    levels = {}
    if base_is_beneath(saved.lora):
        with trial.model.disable_adapter():
            levels["base model"] = outputs_of(trial.model, measured).loss
    return [SizeCurve("share of the information", carried), SizeCurve("loss", losses, levels)]


def _carried(pruned: Pruned, information: dict[str, Tensor]) -> float:
    """Which share of the information the directions kept carry."""
    kept = (information[m][e, d].sum() for m, experts in pruned.kept.items() for e, d in enumerate(experts))
    return float(sum(kept) / sum(x.sum() for x in information.values()))


def _held_out(rows: Rows, is_chosen: bool) -> Probe:
    """The rows to measure the loss on: others than those that chose directions."""
    if not is_chosen:
        return Probe(rows.rows, f"{len(rows.rows)} rows")
    others = rows.rows[TELL : 2 * TELL]
    if others:
        return Probe(others, f"{len(others)} other rows")
    return Probe(rows.rows, f"the same {len(rows.rows)} rows")
