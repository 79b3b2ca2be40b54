"""Which runs a figure is of: each method's learning rate, chosen on validation data, and runs paired by seed.

A method's learning rate is the one of best mean validation accuracy over the seeds that all rates were run with, for each
task, rank and number of examples by itself; figures are of every stored seed at that rate. Differences are paired by seed: the
same examples, the same batches, the same start of head and adapter.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

import pandas as pd

from . import store
from .settings import (
    LATER_SEEDS,
    PASSES_RATE_SEEDS,
    PASSES_SEEDS,
    QUARTER_RATE_SEEDS,
    QUARTER_SEEDS,
    RATES,
    SAME_RATE,
    SEEDS,
)

BASE, OURS, GATES = "lora", "structlora", "gates"
METHOD = ["task", "rank", "examples", "method"]
VALIDATION = ["validation.accuracy", "validation.nll"]

Setting = tuple[str, int, int]


class Runs:
    """Runs by setting and method.

    A run is a row with columns such as `lr`, `trained`, `validation.accuracy` and `test.nll`; a setting is (task, rank,
    examples). Where nothing was run, lookups give no rows.

    Args:
        lines (`list[dict]`): of the store, in any order.
        choosing (`Collection[int]`, *optional*): seeds whose validation figures choose the rates; default: all.
    """

    def __init__(self, lines: list[dict], choosing: Collection[int] | None = None):
        rows = on_one_backbone(pd.json_normalize([{**line, "structlora": None} for line in lines]))
        self.rows = rows.sort_values(list(store.KEY))  # so that no sum depends on which run ended first
        self.choosing = self.rows if choosing is None else self.rows[self.rows["seed"].isin(choosing)]
        self.rates: dict[tuple, float] = choose_rates(
            self.choosing
        ).to_dict()  # (*setting, method) -> learning rate
        self.by_rate: dict[tuple, pd.DataFrame] = {
            key: found.set_index("seed") for key, found in self.rows.groupby([*METHOD, "lr"])
        }
        self._none = self.rows.iloc[:0].set_index("seed")

    @property
    def settings(self) -> list[Setting]:
        return sorted({key[:3] for key in self.rates})

    def at(self, setting: Setting, method: str, lr: float | None) -> pd.DataFrame:
        """Runs of a method at one learning rate, by seed."""
        return self.by_rate.get((*setting, method, lr), self._none)

    def best(self, setting: Setting, method: str) -> pd.DataFrame:
        """Runs of a method at its own learning rate, by seed."""
        return self.at(setting, method, self.rates.get((*setting, method)))

    def differences(self, setting: Setting, method: str, figure: str, base: str = BASE) -> pd.Series:
        """By seed, how much more of a test figure ('accuracy' or 'nll') the method has than `base`, each at its own rate."""
        ours, theirs = (self.best(setting, name)[f"test.{figure}"] for name in (method, base))
        return (ours - theirs).dropna()

    @cached_property
    def over_rates(self) -> dict[tuple, pd.Series]:
        """(*setting, method) -> mean test accuracy at each rate that all methods ran at, over the seeds of all of these."""
        rows = self.choosing
        common = pd.Series(
            [lr in RATES.get(task, ()) for task, lr in zip(rows["task"], rows["lr"], strict=True)], rows.index
        )
        only_others = ~common.groupby([rows[name] for name in METHOD]).transform("any")
        means = of_shared_seeds(rows[common | only_others]).groupby([*METHOD, "lr"])["test.accuracy"].mean()
        return {key: found.droplevel(METHOD) for key, found in means.groupby(METHOD)}


def on_one_backbone(rows: pd.DataFrame) -> pd.DataFrame:
    """The runs on the backbone that LoRA's run of the same task and seed has; all of them where LoRA has none.

    Runs name their backbone (`pretrain.fingerprint`) where the suite has trained it itself, since 27 November 2026.
    """
    named = rows["backbone"].fillna("") if "backbone" in rows else pd.Series("", rows.index)
    place = [rows["task"], rows["seed"]]
    of_base = named.where(rows["method"] == BASE).groupby(place).transform("first")
    return rows[of_base.isna() | (named == of_base)]


def test_runs(lines: list[dict]) -> Runs:
    """The runs that test figures are of: all seeds but those on another ViT, at the rates that `SEEDS` choose."""
    return Runs([line for line in lines if line["seed"] not in LATER_SEEDS], SEEDS)


def quarter_runs(lines: list[dict]) -> Runs | None:
    """The runs of the table of a quarter of the directions; None where there are none yet."""
    found = [line for line in lines if line["seed"] in QUARTER_SEEDS]
    return Runs(found, QUARTER_RATE_SEEDS) if found else None


def passes_runs(lines: list[dict]) -> Runs | None:
    """The runs of the tables by passes; None where there are none yet."""
    found = [line for line in lines if line["seed"] in PASSES_SEEDS]
    return Runs(found, PASSES_RATE_SEEDS) if found else None


def size_rate(runs: Runs, setting: Setting, method: str) -> float | None:
    """The rate of a method in the comparison at equal size: its own, or that of the method that `SAME_RATE` has for it."""
    task, rank, examples = setting
    name, of_rank = SAME_RATE.get((method, rank), (method, rank))
    return runs.rates.get((task, of_rank, examples, name))


def choose_rates(rows: pd.DataFrame) -> pd.Series:
    """By setting and method, the learning rate of best mean validation accuracy, then NLL, then the lowest.

    Args:
        rows (`pd.DataFrame`): runs, with the columns of `store.KEY` and of `VALIDATION`.
    """
    means = of_shared_seeds(rows).groupby([*METHOD, "lr"])[VALIDATION].mean()
    ordered = means.sort_values(VALIDATION, ascending=[False, True], kind="stable").reset_index("lr")
    return ordered.groupby(METHOD)["lr"].first()


def of_shared_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each setting and method, the runs with seeds that every learning rate ran with; all of them where there are none."""
    rates_of_seed = rows.groupby([*METHOD, "seed"])["lr"].transform("nunique")
    shared = rates_of_seed == rows.groupby(METHOD)["lr"].transform("nunique")
    some = shared.groupby([rows[name] for name in METHOD]).transform("any")
    return rows[shared | ~some]
