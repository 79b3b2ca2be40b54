"""The tables, as Markdown, of the test split. Differences are paired by seed; behind each is its 95 % interval over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
from scipy.stats import t as student

from . import methods
from .selection import FIGURES, Runs
from .settings import COMPARISONS, LORA, OURS, Comparison, Place, Row

# What the paper reports (arXiv 2603.14228): step time and memory, LLaMA-7B on a GPU; cosine of gradients.
PAPER_COST = {"structlora": ("1.06x", "1.04x")}
PAPER_GRADIENT_COSINE = {LORA: "0.27 to 0.41", OURS: "0.55 to 0.69"}
DIGITS = {"accuracy": 1, "nll": 3, "ece": 1}
WORDS = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}
NOTHING = "Not all runs that it takes are kept yet."
ROUNDS = 5  # that time ratios of whole steps are shown from


def tables(lines: list[dict], measured_cost: dict, measured_coherence: dict) -> dict[str, str]:
    """Every table, by the name of its marks.

    Args:
        lines (`list[dict]`): of the store.
        measured_cost (`dict`): what `benchmarks.cost.overhead` printed.
        measured_coherence (`dict`): what `benchmarks.quality.coherence` kept; empty where it has kept nothing.
    """
    runs = Runs(lines)
    return {
        **{name: compared(runs, comparison) for name, comparison in COMPARISONS.items()},
        "diagnostics": diagnostics(runs, COMPARISONS["structlora"]),
        "cost": cost(measured_cost),
        "coherence": coherence(measured_coherence),
    }


def compared(runs: Runs, comparison: Comparison) -> str:
    """Test figures of each row at each place and on average, and less those of the base rows."""
    cells, shown = [], comparison.figures
    titles = [label(comparison.rows[base]) for base in comparison.bases]
    parts = list(_parts(comparison))
    for name, places in parts:
        by_row = {row: _mean([runs.figures(place, row) for place in places]) for row in comparison.rows}
        if any(len(by_row[comparison.rows[base]]) < 2 for base in comparison.bases):
            continue
        for row, found in by_row.items():
            if len(found) < 2:
                continue
            means = [_middle(found[figure], DIGITS[figure]) for figure in shown]
            cells.append([name, label(row), len(found), *means])
            for base in comparison.bases:
                gaps = _gaps(runs, places, row, comparison.rows[base])
                cells[-1] += [_interval(gaps[figure], DIGITS[figure]) for figure in shown]
    header = ["where", "method", "seeds", *(WORDS[figure] for figure in shown)]
    header += [f"{WORDS[figure]} − {title}" for title in titles for figure in shown]
    if len(parts) == 1:
        header, cells = header[1:], [row[1:] for row in cells]
    return markdown(header, cells) if cells else NOTHING


def _parts(comparison: Comparison) -> Iterator[tuple[str, Sequence[Place]]]:
    if comparison.by_place:
        yield from ((str(place), (place,)) for place in comparison.places)
    for name, places in (comparison.groups or {}).items():
        yield f"mean of {len(places)}: {name}", places


def _gaps(runs: Runs, places: Sequence[Place], row: Row, base: Row) -> pd.DataFrame:
    """Differences of the figures by seed; over several places, of their mean."""
    if row == base:
        return pd.DataFrame(columns=FIGURES, dtype=float)
    return _mean(
        [(runs.figures(place, row) - runs.figures(place, base)).dropna(how="all") for place in places]
    )


def _mean(figures: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The mean over places. Their seeds are counted anew, in order, and those that all places have are taken."""
    if len(figures) == 1:
        return figures[0]
    return (sum(of_place.reset_index(drop=True) for of_place in figures) / len(figures)).dropna(
        subset=FIGURES[:2]
    )


def _middle(values: pd.Series, digits: int) -> str:
    """The mean; nothing where a figure was not kept."""
    return "" if values.isna().any() else f"{values.mean():.{digits}f}"


def _interval(gaps: pd.Series, digits: int) -> str:
    """Mean (low to high) of differences over seeds; nothing where there are fewer than two."""
    gaps = gaps.dropna()
    if len(gaps) < 2:
        return ""
    middle, reach = gaps.mean(), half_width(gaps)
    return f"{middle:+.{digits}f} ({middle - reach:+.{digits}f} to {middle + reach:+.{digits}f})"


def half_width(gaps: Sequence[float]) -> float:
    """Of the 95 % interval of a mean over seeds, by Student's t."""
    return float(student.ppf(0.975, len(gaps) - 1) * np.std(gaps, ddof=1) / len(gaps) ** 0.5)


def diagnostics(runs: Runs, comparison: Comparison) -> str:
    """Figures of structure beside the paper's: the mean over places, each over its seeds."""
    figures = ("relative_drift", "gradient_cosine", "update_cosine", "moved_A_cosine", "first_singular_share")
    columns = [f"diagnostics.{figure}" for figure in figures]
    cells = []
    for row in comparison.rows:
        found = [runs.runs(place, row).reindex(columns=columns).dropna() for place in comparison.places]
        if all(map(len, found)):
            means = sum(of_place.mean() for of_place in found) / len(found)
            shown = [f"{means[column]:.3f}" for column in columns]
            cells.append(
                [label(row), sum(map(len, found)), *shown, PAPER_GRADIENT_COSINE.get(row.method, "")]
            )
    header = [
        "method",
        "runs",
        *(figure.replace("_", " ") for figure in figures),
        "paper's gradient cosine (another quantity)",
    ]
    return markdown(header, cells) if cells else NOTHING


def cost(measured: dict) -> str:
    """Step time and peak memory relative to LoRA's, as `benchmarks.cost.overhead` measured them in interleaved rounds: whole
    steps where there were enough of them, and LoRA's step with what runs around the optimizer's update.
    """
    cells = []
    for targets, found in measured["adapted"].items():
        for name, ratio in found["step_time_ratio"].items():
            if name != LORA:
                low, high = found["step_time_ratio_quartiles"][name]
                whole = (f"{ratio:.3f}x", f"{low:.3f} to {high:.3f}")
                whole = whole if found["rounds"] >= ROUNDS else ("", "")
                added = f"{found['added_ratio'][name]:.3f}x" if name in found["added_ratio"] else ""
                own = [targets, *whole, added, f"{found['peak_memory_ratio'][name]:.3f}x"]
                cells.append([label(Row(name)), *own, *PAPER_COST.get(name, ("", ""))])
    times = ["step time / LoRA's", "quartiles", "around the update"]
    header = ["method", "adapted", *times, "peak memory / LoRA's", "paper, time", "paper, memory"]
    return markdown(header, cells)


def coherence(found: dict[str, dict[str, list[float]]]) -> str:
    """Cosines over depth by kind, as `benchmarks.quality.coherence` measured them: neighbours, later half, five apart."""
    if not found:
        return NOTHING
    pairs = ("neighbours", "later half", "5 apart")
    header = ["kind", *(f"{name}, {which}" for name in found for which in pairs)]
    kinds = next(iter(found.values()))
    return markdown(
        header, [[kind, *(f"{x:.3f}" for by_kind in found.values() for x in by_kind[kind])] for kind in kinds]
    )


def label(row: Row) -> str:
    return row.label or methods.find(row.method).summary


def markdown(header: list[str], rows: Iterable[list]) -> str:
    as_they_are = {"stralign": None, "disable_numparse": True}
    table = pd.DataFrame([[str(cell) for cell in row] for row in rows], columns=header)
    return table.to_markdown(index=False, tablefmt="github", **as_they_are)
