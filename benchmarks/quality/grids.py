"""The grids: which cells each table is made of. Order matters: what the tables need most comes first."""

from __future__ import annotations

from itertools import product

# task, rank, examples -> learning rates
VISION_RATES = (5e-3, 1e-2, 2e-2)
TEXT_RATES = (2e-3, 4e-3, 8e-3)
SETTINGS = {
    ("digits", 4, 100): VISION_RATES,
    ("noisy-fashion", 4, 400): VISION_RATES,
    ("fashion", 4, 400): VISION_RATES,
    ("movie", 4, 200): TEXT_RATES,
    ("fashion", 4, 100): VISION_RATES,
    ("tweet", 4, 200): TEXT_RATES,
    ("digits", 2, 100): VISION_RATES,
    ("product", 4, 200): TEXT_RATES,
}
SEEDS = range(6)


def _main() -> list[tuple]:
    cells = []
    # All tasks with few seeds first, then more seeds, so that what there is at any time is balanced.
    for seeds in ((0, 1, 2), (3, 4, 5)):
        for (task, rank, examples), rates in SETTINGS.items():
            for seed, method, lr in product(seeds, ("lora", "lora-dropout-0.1", "structlora"), rates):
                cells.append((task, method, rank, examples, lr, seed))
    return cells


GRIDS = {
    "quick": lambda: [("digits", m, 4, 100, 1e-2, s) for s in range(3) for m in ("lora", "structlora")],
    "main": _main,
}


def cells_of(grid: str) -> list[tuple]:
    """The keys of a grid's cells, in the order of `store.KEY`."""
    return list(dict.fromkeys(GRIDS[grid]()))
