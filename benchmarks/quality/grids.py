"""The grids: the cells that each table is made of. Order matters: a few seeds of each method first."""

from __future__ import annotations

from collections.abc import Iterator

from . import store
from .selection import Runs
from .settings import COMPARISONS, LORA, Comparison, Place, Row

Cell = tuple[str, str, int, int, float, int]  # in the order of `store.KEY`

SEEDS_AT_ONCE = 3
QUICK = [("digits", name, 4, 100, 1e-2, seed) for seed in range(3) for name in (LORA, "structlora")]
GRIDS = ("quick", *COMPARISONS)


def cells_of(grid: str) -> list[Cell]:
    """The cells of a grid: all rates with the seeds that choose, and the chosen rate with all seeds.

    What validation has to choose comes once what it chooses from was run: run a grid until it has no cells left.
    """
    return QUICK if grid == "quick" else list(dict.fromkeys(_cells(COMPARISONS[grid], Runs(store.read()))))


def _cells(comparison: Comparison, runs: Runs) -> Iterator[Cell]:
    for place in comparison.places:
        for row in comparison.rows:
            yield from _choosing(runs, place, row)
    done = {tuple(cell) for cell in runs.rows[list(store.KEY)].itertuples(index=False)}
    for start in range(0, max(len(place.seeds) for place in comparison.places), SEEDS_AT_ONCE):
        for place in comparison.places:
            for row in comparison.rows:
                if all(cell in done for cell in _choosing(runs, place, row)):
                    for seed in place.seeds[start : start + SEEDS_AT_ONCE]:
                        yield _cell(place, row, runs.rate(place, row), seed)


def _choosing(runs: Runs, place: Place, row: Row) -> Iterator[Cell]:
    """The cells that choose a row's rate; none where there is one."""
    if place.choosing:
        for lr in runs.tried(place, row):
            yield from (_cell(place.of_choice, row.of_choice, lr, seed) for seed in place.choosing)


def _cell(place: Place, row: Row, lr: float, seed: int) -> Cell:
    return place.task, row.method, round(place.rank * row.share), place.examples, lr, seed
