"""The plots, as SVG: test figures over the learning rate, differences from LoRA, and sweeps over rank and examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t

from .selection import BASE, GATES, OURS, Runs
from .settings import CONTROLS, EXAMPLES, LANGUAGE, MAIN, RANKS, SETTINGS
from .tables import describe, label

COLOURS = {"lora": "#777777", "structlora": "#7b3294", "lora-dropout-0.1": "#008837", "gates": "#e66101"}
POINTS = {"marker": "o", "markersize": 3.5, "capsize": 2}


def draw(runs: Runs, directory: Path) -> None:
    """Write `rates.svg`, `differences.svg` and `sweeps.svg`: the same files from the same runs."""
    directory.mkdir(exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "structlora"}):
        for name, plot in {"rates": rates, "differences": differences, "sweeps": sweeps}.items():
            plot(runs).savefig(directory / f"{name}.svg", metadata={"Date": None})


def rates(runs: Runs) -> Figure:
    """Test accuracy over the learning rate, one panel per setting."""
    columns = 4
    rows = -(-len(SETTINGS) // columns)
    figure = Figure(figsize=(3 * columns, 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, setting in zip(panels.flat, SETTINGS, strict=False):
        ticks = sorted(lr for *ran, lr in runs.by_rate if ran == [*setting, BASE])
        for name in (*MAIN, CONTROLS[0]):
            by_rate = {lr: found["test.accuracy"] for lr in ticks if len(found := runs.at(setting, name, lr))}
            if by_rate:
                _errorbar(axes, by_rate, name)
        axes.set(xscale="log", title=describe(setting))
        _finish(axes, ticks, [f"{lr:g}" for lr in ticks])
    for axes in list(panels.flat)[len(SETTINGS) :]:
        axes.set_visible(False)
    panels[0][0].legend(frameon=False, fontsize=7)
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel("test accuracy, %", fontsize=9)
    return figure


def differences(runs: Runs) -> Figure:
    """StructLoRA with and without coordinator against LoRA at each one's best rate: mean and 95 % interval over seeds."""
    settings = (*SETTINGS, *LANGUAGE)
    figure = Figure(figsize=(9, 0.42 * len(settings) + 1.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    words = {"accuracy": "accuracy, points", "nll": "NLL, nats (less is better)"}
    for axes, (measure, meaning) in zip(panels, words.items(), strict=True):
        for shift, name in ((-0.12, OURS), (0.12, GATES)):
            for place, setting in enumerate(settings):
                gaps = runs.differences(setting, name, measure)
                half = t.ppf(0.975, len(gaps) - 1) * _standard_error(gaps)
                bars = {**POINTS, "markersize": 5, "color": COLOURS[name]}
                axes.errorbar(np.mean(np.asarray(gaps)), place + shift, xerr=half, **bars)
            axes.plot([], [], color=COLOURS[name], marker="o", label=label(name))
        axes.axvline(0, color="black", linewidth=1)
        axes.set_xlabel(f"difference from LoRA: {meaning}")
        axes.grid(alpha=0.25, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(settings)), [describe(s) for s in settings])
    panels[0].invert_yaxis()
    panels[1].legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.33))
    return figure


def sweeps(runs: Runs) -> Figure:
    """Accuracy over rank, and over the number of examples."""
    by_rank = [
        ("rank", f"{task}, examples {n}", {r: (task, r, n) for r in ranks})
        for (task, n), ranks in RANKS.items()
    ]
    by_examples = [
        ("training examples", f"{task}, rank {r}", {n: (task, r, n) for n in counts})
        for (task, r), counts in EXAMPLES.items()
    ]
    panels = [*by_rank, *by_examples]
    figure = Figure(figsize=(3.2 * len(panels), 2.8), layout="constrained")
    for axes, (word, title, settings) in zip(
        all_axes := figure.subplots(1, len(panels)), panels, strict=True
    ):
        for name in (BASE, OURS):
            _errorbar(
                axes, {value: runs.best(s, name)["test.accuracy"] for value, s in settings.items()}, name
            )
        axes.set(xscale="log", xlabel=word, title=title)
        _finish(axes, list(settings), list(settings))
    all_axes[0].set_ylabel("test accuracy, %")
    all_axes[0].legend(frameon=False, fontsize=8)
    return figure


def _errorbar(axes: Axes, values: dict[float, Sequence[float]], name: str) -> None:
    """Mean and standard error of the values at each place on the x axis."""
    means = [np.mean(np.asarray(v)) for v in values.values()]
    errors = [_standard_error(v) if len(v) > 1 else 0 for v in values.values()]
    axes.errorbar(list(values), means, errors, color=COLOURS[name], label=label(name), **POINTS)


def _standard_error(values: Sequence[float]) -> float:
    return np.std(np.asarray(values), ddof=1) / math.sqrt(len(values))


def _finish(axes: Axes, ticks: list, labels: list) -> None:
    axes.set_xticks(ticks, labels)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
