"""Figures of an adapter, each as PNG and PDF: gates, similarity over depth, coverage of singular values, drift in training."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from ..errors import StructLoRAError
from .inspecting import short_names

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise StructLoRAError(
        "no matplotlib",
        "matplotlib, which `--plot` needs",
        'install it: `pip install "structlora-trl[plot]"`, or leave `--plot` out',
    ) from error

_PANEL = (3.2, 2.8)  # inches
_COLUMNS = 4
_DRIFT = {"structlora/drift_energy": "drift energy", "structlora/effective_rank": "effective rank"}


def write(folder: Path, kinds: list, history: list[dict]) -> tuple[list[str], list[str]]:
    """Write what can be drawn.

    Args:
        folder (`Path`): made where missing.
        kinds (`list[KindReport]`): of `structlora inspect`.
        history (`list[dict]`): the Trainer's log; empty where there is none.

    Returns:
        Names of the figures written, and what is lacking with the reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    gated = [kind for kind in kinds if kind.depths[0].gates is not None]
    grouped = [kind for kind in kinds if kind.depths[0].groups is not None]
    related = [kind for kind in kinds if kind.similarity is not None and len(kind.depths) > 1]
    logged = [entry for entry in history if next(iter(_DRIFT)) in entry]
    figures = {
        "gates": (
            partial(_gates, "gates", "direction"),
            gated,
            "gate map: the adapter has no learned gates, or no state beside it",
        ),
        "groups": (partial(_gates, "groups", "head or expert"), grouped, None),  # an option that few set: not missed
        "similarity": (_similarity, related, "similarity map: it needs StructLoRA's state and two depths"),
        "coverage": (_coverage, kinds, "coverage: no module"),
        "drift": (
            _drift,
            logged,
            "drift over training: no trainer_state.json with StructLoRA's figures beside the adapter",
        ),
    }
    written, lacking = [], []
    for name, (draw, rows, reason) in figures.items():
        if not rows:
            lacking += [reason] if reason else []
            continue
        figure = draw(rows)
        for suffix in ("png", "pdf"):
            figure.savefig(folder / f"{name}.{suffix}", dpi=200, bbox_inches="tight")
        written.append(name)
    return written, lacking


def _panels(titles: list[str]):
    columns = min(_COLUMNS, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[len(titles) :]:
        axis.set_axis_off()
    return figure, axes


def _titles(kinds) -> list[str]:
    return [*short_names([kind.name for kind in kinds]).values()]


def _gates(attribute: str, across: str, kinds):
    gates = [
        np.array([getattr(row, attribute) for row in kind.depths]) for kind in kinds
    ]  # (L, r), or (L, groups), each
    low, high = min(rows.min() for rows in gates), max(rows.max() for rows in gates)
    scale = {"vmin": low, "vmax": high, "cmap": "viridis", "aspect": "auto"}  # of what happened: gates may move little
    return _heatmaps(kinds, gates, across, "probability that the gate is open", **scale)


def _similarity(kinds):
    cosines = [np.array(kind.similarity) for kind in kinds]  # (L, L) each
    return _heatmaps(kinds, cosines, "depth", "cosine of the updates", vmin=-1, vmax=1, cmap="RdBu_r")


def _heatmaps(kinds, matrices: list[np.ndarray], across: str, meaning: str, **scale):
    figure, axes = _panels(_titles(kinds))
    for axis, matrix in zip(axes, matrices, strict=True):
        image = axis.imshow(matrix, interpolation="nearest", **scale)
        axis.set(xlabel=across, ylabel="depth")
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes.tolist(), label=meaning)
    return figure


def _coverage(kinds):
    figure, axes = _panels(_titles(kinds))
    for axis, kind in zip(axes, kinds, strict=True):
        shares = np.array(kind.coverage)  # (L, r)
        count = np.arange(1, shares.shape[1] + 1)
        axis.fill_between(count, shares.min(0), shares.max(0), alpha=0.25, label="over depths")
        axis.plot(count, shares.mean(0), marker=".", label="mean")
        axis.set(xlabel="singular values", ylabel="share of the energy", ylim=(0, 1.03))
    axes[0].legend(fontsize=7)
    return figure


def _drift(logged):
    figure, axes = _panels(list(_DRIFT.values()))
    for axis, name in zip(axes, _DRIFT, strict=True):
        axis.plot([entry["step"] for entry in logged], [entry[name] for entry in logged])
        axis.set(xlabel="step")
    return figure
