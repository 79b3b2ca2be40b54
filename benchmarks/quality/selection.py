"""Which runs a figure is of: each method's learning rate, chosen on validation data, and runs paired by seed.

Where a place has several rates, a method's own is the one of best mean validation accuracy, over the seeds that ran at all rates
that its search reaches. Runs at other rates, which another table asked for, choose nothing. Figures are of every stored seed of
the place at that rate. Differences are paired by seed: the same examples, the same batches, the same start of head and adapter.
"""

from __future__ import annotations

import pandas as pd

from . import store
from .settings import FURTHER_RATES, LORA, Place, Row

FIGURES = ["accuracy", "nll", "ece"]
VALIDATION = ["validation.accuracy", "validation.nll"]


class Runs:
    """The store, by setting, method and rate. Where nothing was run, lookups give no rows.

    Args:
        lines (`list[dict]`): of the store, in any order.
    """

    def __init__(self, lines: list[dict]):
        rows = on_one_backbone(pd.json_normalize([{**line, "structlora": None} for line in lines]))
        self.rows = rows.sort_values(list(store.KEY))  # so that no sum depends on which run ended first
        self.by_method = dict(list(self.rows.groupby(["task", "rank", "examples", "method"])))

    def figures(self, place: Place, row: Row) -> pd.DataFrame:
        """'accuracy', 'nll' and 'ece' by seed (NaN where one was not kept), of the runs of a row."""
        runs = self.runs(place, row)
        columns = [f"{row.column}.{figure}" for figure in FIGURES]
        if columns[0] not in runs:
            return pd.DataFrame(columns=FIGURES, dtype=float)
        found = runs.reindex(columns=columns).set_axis(FIGURES, axis=1).astype(float)
        return found.dropna(subset=FIGURES[:2])

    def runs(self, place: Place, row: Row) -> pd.DataFrame:
        """The runs of a row at its rate, by seed."""
        runs, rate = self.of(place, row), self.rate(place, row)
        return runs[(runs["lr"] == rate) & runs["seed"].isin(place.seeds)].set_index("seed")

    def rate(self, place: Place, row: Row) -> float | None:
        """The rate of a row; None where nothing was run that could choose it."""
        if len(place.rates) == 1:
            return place.rates[0]
        runs = self._choosing(place, row)
        return choose_rate(runs[runs["lr"].isin(self.tried(place, row))])

    def tried(self, place: Place, row: Row) -> list[float]:
        """The rates that a row's own is chosen from: those of the place, and one beyond an end of them as long as the best is
        there. The last of them may still have to run.
        """
        runs = self._choosing(place, row)
        end, factors = FURTHER_RATES.get(row.of_choice.method, (0, ()))
        tried = sorted([*place.rates, *(place.rates[end] * factor for factor in factors)])
        while place.goes_beyond:
            ran = runs[runs["lr"].isin(tried)]
            beyond = {tried[0]: tried[0] / 2, tried[-1]: tried[-1] * 2}
            if len(ran) < len(tried) * len(place.choosing) or (best := choose_rate(ran)) not in beyond:
                break
            tried = sorted([*tried, beyond[best]])
        return tried

    def _choosing(self, place: Place, row: Row) -> pd.DataFrame:
        """The runs that choose a row's rate, at all rates."""
        runs = self.of(place.of_choice, row.of_choice)
        return runs[runs["seed"].isin(place.choosing)]

    def of(self, place: Place, row: Row) -> pd.DataFrame:
        """The runs of a row at all rates and with all seeds."""
        key = place.task, round(place.rank * row.share), place.examples, row.method
        return self.by_method.get(key, self.rows.iloc[:0])


def on_one_backbone(rows: pd.DataFrame) -> pd.DataFrame:
    """The runs on the backbone that LoRA's run of the same task and seed has; all of them where LoRA has none.

    Runs name their backbone (`pretrain.fingerprint`) where the suite has trained it itself, since 27 November 2026.
    """
    named = rows["backbone"].fillna("") if "backbone" in rows else pd.Series("", rows.index)
    place = [rows["task"], rows["seed"]]
    of_base = named.where(rows["method"] == LORA).groupby(place).transform("first")
    return rows[of_base.isna() | (named == of_base)]


def choose_rate(runs: pd.DataFrame) -> float | None:
    """The learning rate of best mean validation accuracy, then NLL, then the lowest, over seeds that all rates ran with.

    Args:
        runs (`pd.DataFrame`): of one method at one place, with 'lr', 'seed' and the columns of `VALIDATION`.
    """
    if runs.empty:
        return None
    shared = runs.groupby("seed")["lr"].transform("nunique") == runs["lr"].nunique()
    means = (runs[shared] if shared.any() else runs).groupby("lr")[VALIDATION].mean()
    return float(means.sort_values(VALIDATION, ascending=[False, True], kind="stable").index[0])
