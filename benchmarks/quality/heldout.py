"""Figures of runs at fixed rates, over all held-out examples, and their uncertainty over seeds and examples together.

Where nothing is chosen with a run's validation figures, validation examples are as good as test examples. Seeds share them
all: an error over seeds alone is too small, since other examples would have given another difference. So seeds and examples
are drawn anew together.
"""

from __future__ import annotations

import zlib

import numpy as np
import pandas as pd
from scipy.stats import t as student

from .store import unpacked

SPLITS = ("validation", "test")
DRAWS = 4000


def figures(runs: pd.DataFrame) -> pd.DataFrame:
    """'accuracy', 'nll' and 'ece' over all held-out examples, by seed; splits weigh as they have examples.

    Args:
        runs (`pd.DataFrame`): rows of `Runs` that kept which examples were right.
    """
    counts = [runs[f"{split}.right"].str.partition(":")[0].astype(int) for split in SPLITS]
    pooled = {
        name: sum(count * runs[f"{split}.{name}"] for count, split in zip(counts, SPLITS, strict=True))
        / sum(counts)
        for name in ("accuracy", "nll", "ece")
    }
    return pd.DataFrame(pooled, index=runs.index)


def resampled(ours: pd.DataFrame, theirs: pd.DataFrame, task: str) -> np.ndarray:
    """Differences of accuracy in points, each over seeds and examples drawn anew with replacement: (DRAWS,).

    Runs of one task with as many seeds are drawn alike, so that differences at several rates may be averaged.

    Args:
        ours, theirs (`pd.DataFrame`): runs with the same seeds in the same order.
        task (`str`): what the draws follow from.
    """
    # Seeds x examples, (S, E).
    gaps = np.stack([_right(one) - _right(two) for one, two in zip(_rows(ours), _rows(theirs), strict=True)])
    seeds, examples = gaps.shape
    rng = np.random.default_rng(zlib.crc32(task.encode()))
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS) / seeds
    of_examples = rng.multinomial(examples, np.full(examples, 1 / examples), DRAWS) / examples
    return 100 * ((of_seeds @ gaps) * of_examples).sum(1)


def p_of(mean: float, draws: np.ndarray, seeds: int) -> float:
    """Two-sided p of a mean difference whose spread is that of `draws`, by Student's t, as few seeds ask for."""
    spread = draws.std(ddof=1)
    return float("nan") if spread == 0 else float(2 * student.sf(abs(mean) / spread, seeds - 1))


def _rows(runs: pd.DataFrame):
    return runs[[f"{split}.right" for split in SPLITS]].itertuples(index=False)


def _right(texts: tuple[str, ...]) -> np.ndarray:
    return np.concatenate([np.array(unpacked(text), dtype=float) for text in texts])
