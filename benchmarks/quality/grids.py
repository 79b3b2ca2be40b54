"""The grids: the cells that each table is made of. Order matters: a few seeds of each method first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from . import store
from .selection import Runs
from .settings import COMPARISONS, FURTHER_RATES, LORA, Comparison, Place, Row

Cell = tuple[str, str, int, int, float, int]  # in the order of `store.KEY`

SEEDS_AT_ONCE = 3
QUICK = [("digits", name, 4, 100, 1e-2, seed) for seed in range(3) for name in (LORA, "structlora")]
GRIDS = ("quick", *COMPARISONS)


def rates(place: Place, method: str) -> list[float]:
    """The learning rates that a method is tried at."""
    end, factors = FURTHER_RATES.get(method, (0, ()))
    more = factors if len(place.rates) > 1 else ()
    return sorted([*place.rates, *(place.rates[end] * factor for factor in more)])


def cells_of(grid: str) -> list[Cell]:
    """The cells of a grid: all rates with the seeds that choose, and the chosen rate with all seeds.

    What validation has to choose comes once what it chooses from was run: run a grid until it has no cells left.
    """
    return QUICK if grid == "quick" else list(dict.fromkeys(_cells(COMPARISONS[grid], Runs(store.read()))))


def _cells(comparison: Comparison, runs: Runs) -> Iterator[Cell]:
    for place in comparison.places:
        for row in comparison.rows:
            yield from _choosing(comparison, runs, place, _chooser(row))
    done = {tuple(cell) for cell in runs.rows[list(store.KEY)].itertuples(index=False)}
    for start in range(0, max(len(place.seeds) for place in comparison.places), SEEDS_AT_ONCE):
        for place in comparison.places:
            for row in comparison.rows:
                if all(cell in done for cell in _choosing(comparison, runs, place, _chooser(row))):
                    for seed in place.seeds[start : start + SEEDS_AT_ONCE]:
                        yield _cell(place, row, runs.rate(place, row), seed)


def _chooser(row: Row) -> Row:
    """The row whose runs choose a row's rate; it need not be shown."""
    return replace(row, method=row.rate_of or row.method, rate_of=None)


def _choosing(comparison: Comparison, runs: Runs, place: Place, row: Row) -> Iterator[Cell]:
    """The cells that choose a row's rate; none where there is one."""
    if not place.choosing:
        return
    place = place.of_choice
    stored = runs.of(place, row)
    tried = {*rates(place, row.method), *stored["lr"][stored["seed"].isin(place.choosing)]}
    ends = {min(tried): min(tried) / 2, max(tried): max(tried) * 2}
    if comparison.goes_beyond and (best := runs.rate(place, row)) in ends:
        tried.add(ends[best])
    for lr in sorted(tried):
        yield from (_cell(place, row, lr, seed) for seed in place.choosing)


def _cell(place: Place, row: Row, lr: float, seed: int) -> Cell:
    return place.task, row.method, round(place.rank * row.share), place.examples, lr, seed
