"""Noise by passes: what StructLoRA gains, and where it could do harm, by the number of passes over few examples.

    python -m benchmarks.quality.passes

Each method is at its own rate, which validation data chose (`settings.PASSES_RATE_SEEDS`); figures are of test examples. The
primary endpoint was written down before the runs: the test NLL, mean over tasks at 15 and 50 passes, of StructLoRA less the best
of the dropouts, which is the one of lowest validation NLL in each setting. Intervals are of 95 %, over seeds, of the mean over
settings; a setting without runs of both is left out, and the number of settings says so.
"""

from __future__ import annotations

import pandas as pd
from scipy.stats import t as student

from . import store
from .selection import BASE, OURS, Runs, passes_runs
from .settings import PASSES, PASSES_CONTROLS, PASSES_DROPOUTS, PASSES_METHODS, PASSES_TASKS

BEST_DROPOUT = "best of the dropouts"
FIGURES = ("nll", "accuracy", "ece")
LONG, SHORT = (15, 50), (2, 5)  # passes: where noise is to gain, and where it is to do no harm


def settings_at(passes: tuple[int, ...]) -> list[tuple]:
    return [
        (f"{task}@{n}", rank, examples) for task, (rank, examples, _) in PASSES_TASKS.items() for n in passes
    ]


def runs_of(runs: Runs, setting: tuple, method: str) -> pd.DataFrame:
    """Runs by seed, at the method's own rate; of the dropouts, those of the best one."""
    if method == BEST_DROPOUT:
        tried = [found for name in PASSES_DROPOUTS if len(found := runs.best(setting, name))]
        return min(
            tried, key=lambda found: found["validation.nll"].mean(), default=runs.best(setting, method)
        )
    if method in PASSES_CONTROLS:
        return runs.at(setting, method, runs.rates.get((*setting, OURS)))
    return runs.best(setting, method)


def difference(
    runs: Runs, settings: list[tuple], ours: str, theirs: str, figure: str
) -> tuple[float, float, int]:
    """Mean over settings of the paired differences, half the width of its interval, and the number of settings.

    Seeds of one setting are as good as those of another: its variance is the mean of theirs over their number.
    """
    gaps = []
    for setting in settings:
        pair = [runs_of(runs, setting, name)[f"test.{figure}"] for name in (ours, theirs)]
        if len(gap := (pair[0] - pair[1]).dropna()) > 1:
            gaps.append(gap)
    if not gaps:
        return float("nan"), float("nan"), 0
    errors = [gap.sem() ** 2 for gap in gaps]
    seeds = min(len(gap) for gap in gaps)
    half = student.ppf(0.975, seeds - 1) * sum(errors) ** 0.5 / len(gaps)
    return sum(gap.mean() for gap in gaps) / len(gaps), half, len(gaps)


def table(lines: list[dict]) -> str:
    """The endpoints, then every method against LoRA by passes, in Markdown."""
    if (runs := passes_runs(lines)) is None:
        return "No runs by passes are stored: `python -m benchmarks.quality.run grid passes`, then `passes-finish`."

    def cell(settings: list[tuple], ours: str, theirs: str, figure: str) -> str:
        mean, half, count = difference(runs, settings, ours, theirs, figure)
        digits = 3 if figure == "nll" else 1
        return f"{mean:+.{digits}f} ± {half:.{digits}f} ({count})" if count else "-"

    rows = [
        "| StructLoRA less | passes | NLL | accuracy | ECE |",
        "|---|---|---|---|---|",
        *(
            f"| {theirs} | {', '.join(map(str, passes))} | "
            + " | ".join(cell(settings_at(passes), OURS, theirs, figure) for figure in FIGURES)
            + " |"
            for passes in (LONG, SHORT)
            for theirs in (BEST_DROPOUT, BASE)
        ),
        "",
        "| less LoRA | "
        + " | ".join(f"{passes}: {figure}" for passes in PASSES for figure in FIGURES[:2])
        + " |",
        "|---" * (2 * len(PASSES) + 1) + "|",
        *(
            f"| {name} | "
            + " | ".join(
                cell(settings_at((passes,)), name, BASE, figure)
                for passes in PASSES
                for figure in FIGURES[:2]
            )
            + " |"
            for name in (*PASSES_METHODS[1:], *PASSES_CONTROLS)
        ),
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(store.read()))
