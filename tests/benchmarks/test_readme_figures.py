"""The README's tables are what the store gives, each figure beside LoRA of the same rank."""

from __future__ import annotations

import pandas as pd
from scipy.stats import t as student

from benchmarks.quality import selection, store, tables
from tests.support.launching import ROOT

LINES = store.read()


def _mean_of_eight(rank: int, method: str, column: str = "test", without: str = "") -> pd.DataFrame:
    """Mean figures by seed over the eight tasks of "Adapters of equal size", each at its own rate."""
    runs = selection.quarter_runs(LINES)
    places = [
        (task, rank, examples) for task, _, examples in tables.QUARTER if not without or without not in task
    ]
    found = [runs.at(place, method, selection.size_rate(runs, place, method)) for place in places]
    figures = [rows[[f"{column}.accuracy"]].dropna().set_axis(["accuracy"], axis=1) for rows in found]
    return (sum(figures) / len(figures)).dropna()["accuracy"]


def _interval(gaps: pd.Series) -> str:
    gaps = gaps.dropna()
    reach = student.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / len(gaps) ** 0.5
    return f"{gaps.mean():+.1f} ({gaps.mean() - reach:+.1f} to {gaps.mean() + reach:+.1f})"


def test_the_readme_sets_each_figure_beside_its_rank():
    """Its two tables, row by row, as the store gives them: each adapter less LoRA trained at the same rank."""
    lora, ours = tables.BASE, tables.OURS
    small = _mean_of_eight(4, lora)
    rows = [f"| trained at rank 4 | {small.mean():.1f} | |"]
    for name, column in {
        "trained at rank 16": "test",
        "rank 16, a quarter kept by your data": "cut.information.quarter",
        "rank 16, a quarter kept by SVD of each module": "truncated.quarter",
        "rank 16, a quarter kept by chance": "cut.random.quarter",
    }.items():
        found = _mean_of_eight(16, lora, column)
        rows.append(f"| {name} | {found.mean():.1f} | {_interval(found - small)} |")
    for rank in (8, 16):
        both = [_mean_of_eight(rank, method) for method in (lora, ours)]
        without = [_mean_of_eight(rank, method, without="digits") for method in (lora, ours)]
        gaps = [_interval(theirs - base) for base, theirs in (both, without)]
        rows.append(f"| {rank} | {both[0].mean():.1f} | {both[1].mean():.1f} | {' | '.join(gaps)} |")
    quarter = _mean_of_eight(2, lora)
    for name, method in {
        "2: a quarter of rank 8, kept in training (`keep: 0.25`)": f"{ours}:keep=0.25",
        "the same, a random quarter: the difference is within noise": f"{ours}:keep=0.25,select_by=random",
    }.items():
        found = _mean_of_eight(8, method)
        rows.append(
            f"| {name} | {quarter.mean():.1f} | {found.mean():.1f} | {_interval(found - quarter)} | |"
        )
    written = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [row for row in rows if row not in written]
    assert not missing
