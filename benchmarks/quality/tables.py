"""The tables, as Markdown, of the test split. Differences are paired by seed; behind each is its 95 % interval over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
from scipy.stats import t as student

from . import after_training, methods
from .selection import FIGURES, Runs
from .settings import GRIDS, LORA, METHODS, OURS, PRIMARY, RIVALS, Grid, Place

# What the paper reports (arXiv 2603.14228): step time and memory, LLaMA-7B on a GPU.
PAPER_COST = {"structlora": ("1.06x", "1.04x")}
DIGITS = {"accuracy": 1, "nll": 3, "ece": 1}
WORDS = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}
DROPOUT = "lora-dropout-0.5"
EXPORT = "openness-singular"  # the rule of `export --keep` without rows, and those it is held against
COMPARED = ("information", "information-singular", "norm", "random")
ROUNDS = 5  # that time ratios of whole steps are shown from

Row = tuple[str, str]  # a method, and which of its runs' figures: 'test', 'tempered' or 'scaled'


def tables(lines: list[dict], measured_cost: dict) -> dict[str, str]:
    """Return every table, by the name of its marks.

    Args:
        lines (`list[dict]`): of the store.
        measured_cost (`dict`): what `benchmarks.cost.overhead` printed.
    """
    runs = Runs(lines)
    shown = tuple((method, "test") for method in (LORA, DROPOUT, OURS))
    controls = (*((method, "test") for method in METHODS), (LORA, "scaled"), (LORA, "tempered"))
    return {
        "gates table": summary(runs, GRIDS["gates"]),
        "gates": compared(runs, GRIDS["gates"], shown, rival=shown[1]),
        "cut": cut(runs, GRIDS["gates"]),
        "cut table": cut(runs, GRIDS["gates"], by_place=False),
        "openness": openness(runs, GRIDS["gates"]),
        "primary": primary(runs),
        **{
            name: compared(runs, GRIDS[name], controls, by_place=False)
            for name in ("main", "language", "harm")
        },
        "cost": cost(measured_cost),
    }


def summary(runs: Runs, grid: Grid) -> str:
    """Return what StructLoRA and dropout change in LoRA's accuracy and NLL, on average over the places of each group."""
    columns = [((method, "test"), figure) for method in (OURS, DROPOUT) for figure in ("accuracy", "nll")]
    cells = []
    for name, places in grid.groups.items():
        gaps = [_gaps(runs, places, row, (LORA, "test"))[figure] for row, figure in columns]
        cells.append(
            [name, *(_interval(gap, DIGITS[figure]) for gap, (_, figure) in zip(gaps, columns, strict=True))]
        )
    header = ["where", *(f"{label(row)}: {WORDS[figure]}" for row, figure in columns)]
    return _missing(runs, grid) + markdown(header, cells)


def compared(
    runs: Runs,
    grid: Grid,
    rows: Sequence[Row],
    by_place: bool = True,
    rival: Row | None = None,
) -> str:
    """Return test figures of each row at each place and on average, and less those of the first row; NLL less a rival's."""
    cells = []
    for name, places in _parts(grid, by_place):
        base = _mean([runs.figures(place, *rows[0]) for place in places])
        for row in rows:
            found = _mean([runs.figures(place, *row) for place in places])
            if len(found) > 1 and len(base) > 1:
                gaps = _gaps(runs, places, row, rows[0])
                means = [f"{found[figure].mean():.{DIGITS[figure]}f}" for figure in FIGURES]
                intervals = [
                    _interval(gaps[figure], DIGITS[figure]) if row != rows[0] else "" for figure in FIGURES
                ]
                if rival:
                    gaps = _gaps(runs, places, row, rival)
                    intervals.append(_interval(gaps["nll"], DIGITS["nll"]) if row != rival else "")
                cells.append([name, label(row), len(found), *means, *intervals])
    words = [WORDS[figure] for figure in FIGURES]
    header = ["where", "method", "seeds", *words]
    header += [f"{word} − {label(rows[0])}" for word in words]
    header += [f"NLL − {label(rival)}"] if rival else []
    return _missing(runs, grid) + markdown(header, cells)


def cut(runs: Runs, grid: Grid, by_place: bool = True) -> str:
    """Return test accuracy of StructLoRA whole, cut to a quarter by each rule, and the gaps of `export --keep` to others."""
    columns = {rule: f"cut.{rule}.quarter.accuracy" for rule in after_training.RULES}
    cells = []
    for name, places in _parts(grid, by_place):
        found = _mean([_columns(runs, place, ["test.accuracy", *columns.values()]) for place in places])
        if len(found) > 1:
            others = ("test.accuracy", *(columns[rule] for rule in COMPARED))
            gaps = [_interval(found[columns[EXPORT]] - found[other], 1) for other in others]
            means = [f"{found[column].mean():.1f}" for column in found]
            cells.append([name, len(found), *means, *gaps])
    header = ["where", "seeds", "whole", *columns]
    header += [f"{EXPORT} − {other}" for other in ("whole", *COMPARED)]
    return _missing(runs, grid) + markdown(header, cells)


def openness(runs: Runs, grid: Grid) -> str:
    """Return how open StructLoRA's gates are at the end, how they differ, and how two halves of the examples agree."""
    columns = ["gates.openness", "gates.deviation", "gates.nats"]
    cells = []
    for place in grid.places:
        found = _columns(runs, place, columns)
        halves = _columns(runs, place, ["halves"], "halves")["halves"]
        if len(found):
            means = [
                f"{found[column].mean():.{digits}f}"
                for column, digits in zip(columns, (2, 3, 0), strict=True)
            ]
            cells.append([place, len(found), *means, f"{halves.mean():.2f}" if len(halves) else ""])
    header = [
        "where",
        "seeds",
        "mean openness",
        "deviation between directions",
        "nats",
        "rank correlation of halves",
    ]
    return _missing(runs, grid) + markdown(header, cells)


def primary(runs: Runs) -> str:
    """Return the primary endpoint as a sentence: NLL of StructLoRA less that of the best rival, at 15 and 50 epochs."""
    places = [place for n in PRIMARY for place in GRIDS["main"].groups[f"{n} epochs"]]
    nlls = {name: _mean([runs.figures(place, name) for place in places])["nll"] for name in (OURS, *RIVALS)}
    if any(len(nll) < len(places[0].seeds) for nll in nlls.values()):
        return _missing(runs, GRIDS["main"])
    best = min(RIVALS, key=lambda name: nlls[name].mean())
    gap = _interval(_gaps(runs, places, (OURS, "test"), (best, "test"))["nll"], 3)
    return f"Test NLL of StructLoRA less that of {label((best, 'test'))}, the best rival: {gap}.\n"


def _parts(grid: Grid, by_place: bool = True) -> Iterator[tuple[str, Sequence[Place]]]:
    for name, places in grid.groups.items():
        if by_place:
            yield from ((str(place), (place,)) for place in places)
        if len(places) > 1:
            yield f"mean of {len(places)}: {name}" if by_place else name, places


def _missing(runs: Runs, grid: Grid) -> str:
    cells = runs.cells(grid)
    missing = sum(cell not in runs.done for cell in cells)
    return f"{missing} of {len(cells)} runs are missing.\n\n" if missing else ""


def _columns(runs: Runs, place: Place, columns: list[str], method: str = OURS) -> pd.DataFrame:
    """Return columns of a method's runs by seed, of those that have all."""
    return runs.runs(place, method).reindex(columns=columns).astype(float).dropna()


def _gaps(runs: Runs, places: Sequence[Place], row: Row, base: Row) -> pd.DataFrame:
    """Return differences of the figures by seed; over several places, of their mean."""
    return _mean([(runs.figures(place, *row) - runs.figures(place, *base)).dropna() for place in places])


def _mean(figures: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the mean over places. Their seeds are counted anew, in order, and those that all places have are taken."""
    if len(figures) == 1:
        return figures[0]
    return (sum(of_place.reset_index(drop=True) for of_place in figures) / len(figures)).dropna()


def _interval(gaps: pd.Series, digits: int) -> str:
    """Return mean (low to high) of differences over seeds, their 95 % interval; nothing where there are fewer than two."""
    if len(gaps) < 2:
        return ""
    # Student's t
    middle, reach = gaps.mean(), student.ppf(0.975, len(gaps) - 1) * np.std(gaps, ddof=1) / len(gaps) ** 0.5
    return f"{middle:+.{digits}f} ({middle - reach:+.{digits}f} to {middle + reach:+.{digits}f})"


def cost(measured: dict) -> str:
    """Return step time and peak memory relative to LoRA's, as `benchmarks.cost.overhead` measured them in interleaved
    rounds: whole steps where there were enough of them, and LoRA's step with what runs around the optimizer's update.
    """
    names = {
        "structlora": "StructLoRA",
        "gates": "StructLoRA without coordinator",
        "dora": "DoRA",
        "adalora": "AdaLoRA",
    }
    cells = []
    for targets, found in measured["adapted"].items():
        for name, ratio in found["step_time_ratio"].items():
            if name != LORA:
                low, high = found["step_time_ratio_quartiles"][name]
                whole = (f"{ratio:.3f}x", f"{low:.3f} to {high:.3f}")
                whole = whole if found["rounds"] >= ROUNDS else ("", "")
                added = f"{found['added_ratio'][name]:.3f}x" if name in found["added_ratio"] else ""
                own = [targets, *whole, added, f"{found['peak_memory_ratio'][name]:.3f}x"]
                cells.append([names[name], *own, *PAPER_COST.get(name, ("", ""))])
    times = ["step time / LoRA's", "quartiles", "around the update"]
    header = ["method", "adapted", *times, "peak memory / LoRA's", "paper, time", "paper, memory"]
    return markdown(header, cells)


def label(row: Row) -> str:
    method, column = row
    also = {"test": "", "scaled": ", update times a scalar", "tempered": ", logits over a temperature"}
    return methods.find(method).summary + also[column]


def markdown(header: list[str], rows: Iterable[list]) -> str:
    """Return a table; nothing without rows."""
    if not rows:
        return ""
    as_they_are = {"stralign": None, "disable_numparse": True}
    table = pd.DataFrame([[str(cell) for cell in row] for row in rows], columns=header)
    return table.to_markdown(index=False, tablefmt="github", **as_they_are) + "\n"
