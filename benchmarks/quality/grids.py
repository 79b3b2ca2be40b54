"""The grids: which cells each table is made of. Order matters: what the tables need most comes first."""

from __future__ import annotations

# task, rank, examples -> learning rates
DIGITS_RATES = (5e-3, 1e-2, 2e-2)
FASHION_RATES = (2e-3, 5e-3, 1e-2)
TEXT_RATES = (2e-3, 4e-3, 8e-3)
SETTINGS = {
    ("digits", 4, 100): DIGITS_RATES,
    ("noisy-fashion", 4, 400): FASHION_RATES,
    ("fashion", 4, 400): FASHION_RATES,
    ("movie", 4, 200): TEXT_RATES,
    ("fashion", 4, 100): FASHION_RATES,
    ("tweet", 4, 200): TEXT_RATES,
    ("digits", 2, 100): DIGITS_RATES,
    ("product", 4, 200): TEXT_RATES,
}
SEEDS = range(6)
FIRST = [("digits", 4, 100), ("noisy-fashion", 4, 400), ("fashion", 4, 400)]


def _cells(settings, methods, seeds) -> list[tuple]:
    return [
        (task, method, rank, examples, lr, seed)
        for task, rank, examples in settings
        for seed in seeds
        for method in methods
        for lr in SETTINGS[task, rank, examples]
    ]


MAIN = ("lora", "structlora", "lora-dropout-0.1")
# Tried on validation data alone, at one learning rate that suits LoRA.
SEARCH_SETTINGS = {("digits", 4, 100): 1e-2, ("noisy-fashion", 4, 400): 5e-3, ("fashion", 4, 400): 5e-3}
IDEAS = (
    "frozen-logits",
    "no-coordinator",
    "no-gates",
    "structlora:x_theta=1.0",
    "structlora:gate_init=0.9",
    "structlora:temperature=0.1",
    "structlora:x_fade_noise=0.5",
    "structlora:kl_weight=0.0",
    "structlora:x_share_noise=1",
    "structlora:gate_init=0.5",
    "structlora:side=both",
    "structlora:gate_lr=0.1",
    "structlora:share_gates=true",
    "structlora:prior=0.9,kl_weight=0.3",
    "structlora:coordinator_lr=0.003",
    "structlora:coordinator_lr=0,x_theta=0.5",
    "structlora:coordinator_lr=0,x_theta=-0.3",
    "structlora:x_warm_noise=0.3",
    "structlora:hard_gates=true",
    "structlora:temperature=0.67",
    "structlora:semantic_threshold=0.1",
    "structlora:coordinator_lr=0.03",
    "no-align",
    "random-filter",
)


def _search() -> list[tuple]:
    return [
        (task, method, rank, examples, lr, seed)
        for method in IDEAS
        for (task, rank, examples), lr in SEARCH_SETTINGS.items()
        for seed in range(3)
    ]


GRIDS = {
    "quick": lambda: [("digits", m, 4, 100, 1e-2, s) for s in range(3) for m in ("lora", "structlora")],
    "first": lambda: _cells(FIRST, MAIN, range(3)),
    "search": _search,
    # All settings with few seeds first, then more, so that what there is at any time is balanced.
    "main": lambda: _cells(SETTINGS, MAIN, SEEDS[:3]) + _cells(SETTINGS, MAIN, SEEDS[3:]),
}


def cells_of(grid: str) -> list[tuple]:
    """The keys of a grid's cells, in the order of `store.KEY`."""
    return list(dict.fromkeys(GRIDS[grid]()))
