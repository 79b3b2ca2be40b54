"""The charts of one run or two, by matplotlib: SVG on the page, PNG and PDF by `--plot`."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from ..core.kinds import short_names
from .inspecting import DepthReport, KindReport, gates_in_words, log_history, module_table, report
from .load_adapter import Saved
from .pruning import size_curve
from .trial import SizeCurve

RUN_COLOURS = ("#c2410c", "#1d4ed8")
_LINES = ("-", "--", ":", "-.")
# Names of folders and modules are no mathematics.
_STYLE = {"font.size": 8, "text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False}
# What the Trainer logs -> the title of its axes.
_LOGGED = {"eval_loss": "Held-out loss", "loss": "Training loss", "structlora/nats": "Nats of the gates"}
# What is shown of each module -> title, how to read it, colours.
_OF_MODULES = {
    "nats": (
        "What the gates let through",
        "A cell is one module. Its nats, ½ log(1 + 1/α) summed over its directions, are the most that they can pass about the "
        "input through the noise that training has put on them. Dark: the labels held the gates open. Pale: the run did without, "
        "and structlora export --keep counts it for less.",
        "YlGnBu",
    ),
    "norm": ("Norm", "Size of each module's update as it is added to the weight.", "Purples"),
    "similarity": (
        "Similarity over depth",
        "Mean cosine, with the neighbouring layers, of the subspaces of the residual stream that the updates read or write.",
        "Reds",
    ),
}


@dataclass
class Run:
    """A run that charts show.

    Args:
        name (`str`): of the run.
        saved (`Saved`): what it left.
        curves (`list[SizeCurve]`, *optional*): of `information_curves`, where there is data.
    """

    name: str
    saved: Saved
    curves: Sequence[SizeCurve] = ()

    @cached_property
    def kinds(self) -> list[KindReport]:
        """The figures of each kind."""
        return report(self.saved)

    @cached_property
    def depths(self) -> list[DepthReport]:
        """The figures of each module."""
        return [depth for kind in self.kinds for depth in kind.depths]

    @cached_property
    def history(self) -> list[dict]:
        """The Trainer's log."""
        return log_history(self.saved.folder)


class Chart(NamedTuple):
    """A chart: the name of its file, its title, how to read it, and its drawing."""

    key: str
    title: str
    text: str
    figure: Figure

    def image(self) -> str:
        """The drawing as the address of an `img` element, SVG in it."""
        out = io.BytesIO()
        self.figure.savefig(out, format="svg")
        return f"data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode()}"

    def write(self, folder: Path) -> None:
        """Write the drawing to a folder, as PNG and PDF."""
        for suffix in ("png", "pdf"):
            self.figure.savefig(folder / f"{self.key}.{suffix}", dpi=200)


def charts(runs: list[Run]) -> list[Chart]:
    """Return all that can be drawn of one run, or of two side by side, what people show to others first.

    Raises:
        StructLoRAError: a Trainer's log is damaged.
    """
    with rc_context(_STYLE):
        nats, *others = (_of_modules(runs, value) for value in _OF_MODULES)
        return [chart for chart in (nats, _training(runs), _sizes(runs), *others) if chart]


def _of_modules(runs: list[Run], value: str) -> Chart | None:
    """A map of each run: kinds (rows) by layers (columns)."""
    maps = {}
    for run in runs:
        table = module_table(run.kinds)
        if value in table:
            rows = table.dropna(subset=value)
            layers = sorted(
                rows["layer"].unique(), key=lambda layer: [*map(int, filter(None, layer.split(".")))]
            )
            cells = rows.pivot(index="kind", columns="layer", values=value)
            maps[run.name] = cells.loc[rows["kind"].unique(), layers]
    if not maps:
        return None
    title, text, colours = _OF_MODULES[value]
    heights = [len(cells) + 2 for cells in maps.values()]
    figure = Figure(figsize=(9, 0.25 * sum(heights)), layout="constrained")
    axes = [*figure.subplots(len(maps), squeeze=False, height_ratios=heights).flat]
    most = max(np.nanmax(cells.to_numpy()) for cells in maps.values())
    for axis, (name, cells) in zip(axes, maps.items(), strict=True):
        image = axis.imshow(cells, cmap=colours, vmin=0, vmax=most, aspect="auto")
        every = -(-len(cells.columns) // 32)
        axis.set_xticks(range(0, len(cells.columns), every), cells.columns[::every])
        axis.set_yticks(range(len(cells)), short_names([*cells.index]).values())
        axis.set(title=name, xlabel="layer")
    figure.colorbar(image, ax=axes, label=value)
    if value == "nats":
        text += "".join(f" {_of(runs, run)}{gates_in_words(run.depths)}" for run in runs if run.name in maps)
    return Chart(value, title, text, figure)


def _training(runs: list[Run]) -> Chart | None:
    logs = [pd.DataFrame(run.history) for run in runs]
    shown = [key for key in _LOGGED if any(key in log for log in logs)]
    if not shown:
        return None
    figure = Figure(figsize=(3 * len(shown), 2.4), layout="constrained")
    for axis, key in zip(figure.subplots(1, len(shown), squeeze=False).flat, shown, strict=True):
        for run, log, colour in zip(runs, logs, RUN_COLOURS, strict=False):
            if key in log:
                points = log.dropna(subset=key)
                axis.plot(points["step"], points[key], color=colour, marker=".", label=_plain(run.name))
        axis.set(title=_LOGGED[key], xlabel="step")
        axis.legend(frameon=False)
    text = "From the Trainer's log. Where gates have noise, training losses are with it; held-out ones are without."
    return Chart("training", "Training", text, figure)


def _sizes(runs: list[Run]) -> Chart | None:
    lines, text = (
        defaultdict(list),
        "What is left of an adapter with fewer directions, chosen over the whole model.",
    )
    for run, colour in zip(runs, RUN_COLOURS, strict=False):
        measure, points = size_curve(run.saved)
        share = [SizeCurve(f"share of {measure}", {"": points})] if points else []
        for curve in [*run.curves, *share]:
            for (order, points), style in zip(curve.orders.items(), _LINES, strict=False):
                lines[curve.value].append((f"{run.name} {order}", points, colour, style))
            for level, height in curve.levels.items():
                lines[curve.value].append((f"{run.name} {level}", [(0, height), (1, height)], "grey", "-"))
        if points:
            quarter = np.interp(0.25, *zip(*points, strict=True))
            text += f" {_of(runs, run)}A quarter of the directions has {quarter:.0%} of {measure}."
    if not lines:
        return None
    if not any(run.curves for run in runs):
        text += (
            " Give some rows with --data to see the loss at each size: norms do not tell what a task needs."
        )
    figure = Figure(figsize=(4.5 * len(lines), 3.5), layout="constrained")
    for axis, (value, drawn) in zip(
        figure.subplots(1, len(lines), squeeze=False).flat, lines.items(), strict=True
    ):
        for label, points, colour, style in drawn:
            axis.plot(*zip(*points, strict=True), style, color=colour, label=_plain(label))
        axis.set(title=value, xlabel="share of the directions kept", xlim=(0, 1.02))
        axis.legend(frameon=False)
    return Chart("size", "What a smaller adapter keeps", text, figure)


def _plain(label: str) -> str:
    """A label that matplotlib shows, which leaves out those that begin with '_'."""
    return f" {label}"


def _of(runs: list[Run], run: Run) -> str:
    return f"{run.name}: " if len(runs) > 1 else ""
