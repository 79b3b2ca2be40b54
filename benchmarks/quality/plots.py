"""The plot, as SVG: differences from LoRA in accuracy, NLL and calibration error."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from .selection import Runs
from .settings import COMPARISONS, GATES, LORA, OURS, Row
from .tables import half_width, label

COLOURS = {OURS: "#7b3294", GATES: "#e66101"}
WORDS = {"accuracy": "accuracy, points", "nll": "NLL, nats", "ece": "ECE, points"}


def draw(runs: Runs, directory: Path) -> None:
    """Write `differences.svg`: the same file from the same runs."""
    directory.mkdir(exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "structlora"}):
        differences(runs).savefig(directory / "differences.svg", metadata={"Date": None})


def differences(runs: Runs) -> Figure:
    """Of each method of the first table: mean and 95 % interval over seeds, at the rate of LoRA."""
    places = COMPARISONS["structlora"].places
    figure = Figure(figsize=(10, 0.55 * len(places) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(WORDS), sharey=True)
    for axes, (measure, words) in zip(panels, WORDS.items(), strict=True):
        for shift, (name, colour) in zip((-0.1, 0.1), COLOURS.items(), strict=True):
            for height, place in enumerate(places):
                gaps = runs.figures(place, Row(name))[measure] - runs.figures(place, Row(LORA))[measure]
                if len(gaps := gaps.dropna()) > 1:
                    bars = {"marker": "o", "markersize": 5, "capsize": 2, "color": colour}
                    axes.errorbar(gaps.mean(), height + shift, xerr=half_width(gaps), **bars)
            axes.plot([], [], color=colour, marker="o", label=label(Row(name)))
        axes.axvline(0, color="black", linewidth=1)
        axes.set_xlabel(f"less LoRA: {words}")
        axes.grid(alpha=0.25, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(places)), list(map(str, places)))
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure
