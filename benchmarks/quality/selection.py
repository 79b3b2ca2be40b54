"""Which runs a figure is of: each method's learning rate, chosen on validation data, and runs paired by seed."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from . import store
from .settings import HALVES, LORA, Grid, Place

FIGURES = ["accuracy", "nll", "ece"]
Cell = tuple[str, str, int, int, float | None, int]  # in the order of `store.KEY`


class Runs:
    """The store, by place, method and rate. Where nothing was run, lookups give no rows.

    Args:
        lines (`list[dict]`): of the store, in any order.
    """

    def __init__(self, lines: list[dict]):
        self.done = {store.key_of(line) for line in lines}
        empty = pd.DataFrame(columns=[*store.KEY, "validation.nll"])
        rows = pd.json_normalize([{**line, "structlora": None} for line in lines]) if lines else empty
        # Sorted, so that no sum depends on which run ended first.
        self._rows = on_one_backbone(rows).sort_values(list(store.KEY))
        self._by_method = dict(list(self._rows.groupby(["task", "rank", "examples", "method"])))

    def runs(self, place: Place, method: str) -> pd.DataFrame:
        """Return the runs of a method at its rate, by seed."""
        runs = self._of(place, method)
        at_rate = runs["lr"] == self.rate(place, method)
        return runs[at_rate & runs["seed"].isin(place.seeds)].set_index("seed")

    def figures(self, place: Place, method: str, column: str = "test") -> pd.DataFrame:
        """Return 'accuracy', 'nll' and 'ece' by seed."""
        found = self.runs(place, method).reindex(columns=[f"{column}.{figure}" for figure in FIGURES])
        return found.set_axis(FIGURES, axis=1).astype(float).dropna()

    def rate(self, place: Place, method: str) -> float | None:
        """Return the rate of lowest mean validation NLL; None until all rates ran with all seeds that choose."""
        if len(place.rates) == 1:
            return place.rates[0]
        runs = self._of(place, method)
        runs = runs[runs["lr"].isin(place.rates) & runs["seed"].isin(place.choosing)]
        if len(runs) < len(place.rates) * len(place.choosing):
            return None
        return float(runs.groupby("lr")["validation.nll"].mean().idxmin())

    def cells(self, grid: Grid) -> list[Cell]:
        """Return the cells of a grid, a few seeds of all methods first; the rate is None where it is not chosen yet."""
        return list(dict.fromkeys(self._cells(grid)))

    def _cells(self, grid: Grid) -> Iterator[Cell]:
        at = [(place, method) for place in grid.places for method in grid.methods]
        for i in range(max(len(place.choosing) for place in grid.places)):
            for place, method in at:
                for lr in place.rates if i < len(place.choosing) else ():
                    yield place.task, method, place.rank, place.examples, lr, place.choosing[i]
        rates = {pair: self.rate(*pair) for pair in at}
        for i in range(max(len(place.seeds) for place in grid.places)):
            for place, method in at:
                if i < len(place.seeds):
                    lr = rates[place, method]
                    yield place.task, method, place.rank, place.examples, lr, place.seeds[i]

    def _of(self, place: Place, method: str) -> pd.DataFrame:
        """Return the runs of a method at all rates and with all seeds."""
        key = place.task, place.rank, place.examples, method
        return self._by_method.get(key, self._rows.iloc[:0])


def on_one_backbone(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the runs on the backbone that LoRA's run of the same task, examples and seed has; all where LoRA has none.

    Another processor trains another ViT (`pretrain.fingerprint`), and runs on two of them are no pair. Halves of the
    examples are compared with each other alone.
    """
    named = rows["backbone"].fillna("") if "backbone" in rows else pd.Series("", rows.index)
    of_base = (
        named.where(rows["method"] == LORA)
        .groupby([rows[x] for x in ("task", "examples", "seed")])
        .transform("first")
    )
    return rows[of_base.isna() | (named == of_base) | (rows["method"] == HALVES)]
