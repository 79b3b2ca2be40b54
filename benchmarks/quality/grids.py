"""The grids: which cells each table is made of. Order matters: what the tables need most comes first."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from . import store
from .selection import BASE, OURS, passes_runs, quarter_runs, size_rate, test_runs
from .settings import (
    ABLATIONS,
    AGAINST,
    COMPARED,
    CUT_SEEDS,
    DROPOUT,
    EARLY,
    EQUAL_PLACES,
    EQUAL_RULES,
    EQUAL_SEEDS,
    EVIDENCE,
    EXAMPLES,
    FAIR,
    FIRST,
    FURTHER_RATES,
    FURTHER_SEEDS,
    KEPT_LANGUAGE,
    KEPT_PLACES,
    LANGUAGE,
    LANGUAGE_SIZE_SEEDS,
    LANGUAGE_SIZES,
    MAIN,
    MAIN_SEEDS,
    MORE_RATES,
    NOISE_CONTROLS,
    ON_TEXT,
    OTHERS,
    OURS_FAIR,
    PAPER_PLACES,
    PAPER_RATES,
    PARTS,
    PASSES,
    PASSES_CONTROLS,
    PASSES_DROPOUTS,
    PASSES_LANGUAGE_SEEDS,
    PASSES_METHODS,
    PASSES_RATE_SEEDS,
    PASSES_SEEDS,
    PASSES_TASKS,
    QUARTER,
    QUARTER_CHANCE,
    QUARTER_METHODS,
    QUARTER_RATE_SEEDS,
    RANKS,
    RATE_SEEDS,
    RATES,
    ROUNDS,
    SAME_RATE,
    SEEDS,
    SETTINGS,
    SIZE_METHODS,
    SIZE_SEEDS,
    WHERE_IT_GAINS,
    kept_methods,
    selected,
)


def rates(setting: tuple, method: str) -> list[float]:
    """The learning rates that a method is tried at."""
    more = MORE_RATES.get(setting, ()) if method in MAIN else ()
    return sorted([*_rates_of_task(setting[0], method), *more])


def _rates_of_task(task: str, method: str) -> list[float]:
    common = RATES[task]
    end, factors = FURTHER_RATES.get(method, (0, ()))
    return sorted([*common, *(common[end] * factor for factor in factors)])


def _cells(settings, names, seeds) -> list[tuple]:
    return [
        (task, name, rank, examples, lr, seed)
        for task, rank, examples in settings
        for seed in seeds
        for name in names
        for lr in rates((task, rank, examples), name)
    ]


def _at_chosen_rates(settings, names, seeds=FURTHER_SEEDS, rate_of: str | None = None) -> list[tuple]:
    """Cells at the rate that validation chose, once all rates were run: for each method its own, or that of `rate_of`."""
    chosen = test_runs(store.read()).rates
    return [
        (setting[0], name, *setting[1:], lr, seed)
        for seed in seeds
        for setting in settings
        for name in names
        if (lr := chosen.get((*setting, rate_of or name))) is not None
    ]


def _search(ideas, places, seeds, base: str = BASE) -> list[tuple]:
    return [
        (task, name, rank, examples, lr, seed)
        for seed in seeds
        for name in (base, *ideas)
        for (task, rank, examples), lr in places
    ]


def _swept() -> list[tuple]:
    ranks = [(task, rank, examples) for (task, examples), ranks in RANKS.items() for rank in ranks]
    counts = [(task, rank, count) for (task, rank), counts in EXAMPLES.items() for count in counts]
    return [*ranks, *counts]


def _equal_size(setting: tuple) -> list[tuple]:
    """Of one setting: chance and the rules, LoRA at the small rank at two rates and at the full rank."""
    task, rank, examples = setting
    lr, keep = EQUAL_PLACES[setting]
    small = round(rank * keep)
    rules = [(selected(rule, keep), rank, lr) for rule in EQUAL_RULES]
    # Chance, the rules of gradients and LoRA come first, three seeds at a time, so that few runs give paired comparisons.
    early = [*rules[:6], (BASE, small, lr), (BASE, rank, lr)]
    late = [*rules[6:], (BASE, small, 2 * lr)]
    return [
        (task, name, r, examples, at, seed)
        for seeds in (EQUAL_SEEDS[:3], EQUAL_SEEDS[3:6], EQUAL_SEEDS[6:])
        for methods in (early, late)
        for seed in seeds
        for name, r, at in methods
    ]


def _kept(settings: Iterable[tuple], seeds: Iterable[range]) -> list[tuple]:
    """Selection by the package itself: by information and by chance first, then beside gates and LoRA at both ranks."""
    cells = []
    for some in seeds:
        for first in (True, False):
            for setting in settings:
                task, rank, examples = setting
                lr, keep = EQUAL_PLACES[setting]
                ours = [(name, rank) for name in kept_methods(keep)]
                others = [(name, r) for name in ("gates", BASE) for r in (round(rank * keep), rank)]
                cells += [
                    (task, name, r, examples, lr, seed)
                    for seed in some
                    for name, r in (ours[:2] if first else [*ours[2:], *others])
                ]
    return cells


def _by_rate(methods: Iterable[tuple[str, int]]) -> list[tuple]:
    """Methods of the comparison at equal size, at every rate: validation chooses the rate with these."""
    return [
        (task, name, rank, examples, lr, seed)
        for seed in QUARTER_RATE_SEEDS
        for task, _, examples in QUARTER
        for name, rank in methods
        for lr in _rates_of_task(task, name)
    ]


def _beyond(methods: Iterable[tuple[str, int]]) -> list[tuple]:
    """One rate beyond the range of those that were tried, wherever the best of these lies at an end of it.

    Run it until it has no cells.
    """
    runs = quarter_runs(store.read())
    cells = []
    for seed in QUARTER_RATE_SEEDS:
        for task, _, examples in QUARTER:
            for name, rank in methods:
                key = task, rank, examples, name
                if runs and key in runs.rates:
                    tried = [lr for *other, lr in runs.by_rate if tuple(other) == key]
                    ends = {min(tried): min(tried) / 2, max(tried): max(tried) * 2}
                    if (best := runs.rates[key]) in ends:
                        cells.append((task, name, rank, examples, ends[best], seed))
    return cells


def _at_size(methods: Iterable[tuple[str, int]], seeds: Iterable[int]) -> list[tuple]:
    """The same with further seeds, at the rates that were chosen."""
    runs = quarter_runs(store.read())
    return [
        (task, name, rank, examples, lr, seed)
        for seed in seeds
        for task, _, examples in QUARTER
        for name, rank in methods
        if runs and (lr := size_rate(runs, (task, rank, examples), name)) is not None
    ]


def _quarter_finish() -> list[tuple]:
    return [
        *_at_size([*QUARTER_METHODS, QUARTER_CHANCE], CUT_SEEDS),
        *_at_size([QUARTER_CHANCE], QUARTER_RATE_SEEDS),
    ]


def _passes() -> list[tuple]:
    """Noise by passes, every method at every rate: the cheap tasks first."""
    return [
        (f"{task}@{passes}", name, rank, examples, lr, seed)
        for task, (rank, examples, rates_of_task) in PASSES_TASKS.items()
        for seed in PASSES_RATE_SEEDS
        for passes in PASSES
        for name in _averaging(task)
        for lr in rates_of_task
    ]


def _passes_finish() -> list[tuple]:
    """The same with further seeds, at the rates that were chosen; the controls with all seeds, at StructLoRA's rate."""
    runs = passes_runs(store.read())
    cells = []
    for task, (rank, examples, _) in PASSES_TASKS.items():
        seeds = PASSES_LANGUAGE_SEEDS if task.startswith("smollm") else PASSES_SEEDS
        for seed in seeds:
            for passes in PASSES:
                setting = f"{task}@{passes}", rank, examples
                for name in (*_averaging(task), *PASSES_CONTROLS):
                    lr = runs and runs.rates.get((*setting, OURS if name in PASSES_CONTROLS else name))
                    if lr:
                        cells.append((setting[0], name, rank, examples, lr, seed))
    return cells


def _averaging(task: str) -> list[str]:
    """The methods of the comparison by passes; TRL's runs average no weights."""
    return [name for name in PASSES_METHODS if name != "lora-average" or task != "smollm-numbers-few"]


GRIDS = {
    "quick": lambda: [("digits", name, 4, 100, 1e-2, seed) for seed in RATE_SEEDS for name in MAIN[:2]],
    "first": lambda: _cells(FIRST, MAIN, RATE_SEEDS),
    **{name: functools.partial(_search, *given) for name, given in ROUNDS.items()},
    **{name: functools.partial(_search, *given, AGAINST.get(name, BASE)) for name, given in EVIDENCE.items()},
    "main": lambda: _cells(SETTINGS, MAIN, RATE_SEEDS),
    "early": lambda: _cells(EARLY, MAIN, RATE_SEEDS),
    "early-finish": lambda: _at_chosen_rates(EARLY, MAIN),
    "main-finish": lambda: _at_chosen_rates(SETTINGS, MAIN, MAIN_SEEDS),  # once "main" is done
    "controls": lambda: [
        *_cells(COMPARED, (DROPOUT, *NOISE_CONTROLS), RATE_SEEDS),
        *_cells(ON_TEXT, [DROPOUT], RATE_SEEDS),
    ],
    # Once "controls" is done. Images are compared in "another-vit": the ViT of the main table's runs is not kept.
    "fair": lambda: [
        *_at_chosen_rates(ON_TEXT, [DROPOUT], SEEDS),
        *_at_chosen_rates(ON_TEXT, FAIR[1:], SEEDS, BASE),
        *_at_chosen_rates(ON_TEXT, OURS_FAIR, SEEDS, OURS),
    ],
    "others": lambda: _cells(COMPARED, OTHERS, RATE_SEEDS),
    "ablations": lambda: _at_chosen_rates(COMPARED, ABLATIONS, RATE_SEEDS, OURS),
    "parts": lambda: _at_chosen_rates(WHERE_IT_GAINS, PARTS, SEEDS, OURS),
    "sweeps": lambda: _cells(_swept(), MAIN, RATE_SEEDS),
    "sweeps-finish": lambda: _at_chosen_rates(_swept(), MAIN),  # once "sweeps" is done
    **{f"equal-{setting[0]}": functools.partial(_equal_size, setting) for setting in EQUAL_PLACES},
    "kept": lambda: _kept(KEPT_PLACES, (EQUAL_SEEDS[:6], EQUAL_SEEDS[6:])),
    "kept-language": lambda: _kept([KEPT_LANGUAGE], (EQUAL_SEEDS[:3], EQUAL_SEEDS[3:6])),
    "quarter": lambda: _by_rate(QUARTER_METHODS),
    "quarter-beyond": lambda: _beyond(QUARTER_METHODS),  # once "quarter" is done, until it is empty
    "quarter-finish": _quarter_finish,  # then
    "sizes": lambda: _by_rate(SIZE_METHODS),
    "sizes-beyond": lambda: _beyond(SIZE_METHODS),  # once "sizes" is done, until it is empty
    "sizes-finish": lambda: _at_size(  # then
        [*SIZE_METHODS, *(method for method in SAME_RATE if method != QUARTER_CHANCE)], SIZE_SEEDS
    ),
    "sizes-language": lambda: [
        (setting[0], name, rank, setting[2], lr, seed)
        for setting, lr in LANGUAGE_SIZES.items()
        for seed in LANGUAGE_SIZE_SEEDS
        for name, rank in (*QUARTER_METHODS, QUARTER_CHANCE)
    ],
    "passes": _passes,
    "passes-finish": _passes_finish,  # once "passes" is done
    "paper-rates": lambda: [
        (task, name, rank, examples, lr, seed)
        for task, rank, examples in PAPER_PLACES
        for seed in PASSES_RATE_SEEDS
        for name in (BASE, PASSES_DROPOUTS[0], OURS)
        for lr in PAPER_RATES
    ],
    "language": lambda: _cells(LANGUAGE, MAIN, range(2)),
    "language-finish": lambda: _at_chosen_rates(LANGUAGE, MAIN, range(2, 6)),  # once "language" is done
}


def cells_of(grid: str) -> list[tuple]:
    """The keys of a grid's cells, in the order of `store.KEY`."""
    return list(dict.fromkeys(GRIDS[grid]()))
