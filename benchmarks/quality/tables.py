"""The tables, as Markdown. Everything but the search is of the test split.

p is of a two-sided paired t-test. q, in brackets after it, is p corrected for the number of p-values in its table by Benjamini
and Hochberg: of the differences with q < 0.05, at most one in twenty is expected to be chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, ttest_1samp

from . import methods
from .selection import BASE, GATES, OURS, Runs, Setting, test_runs
from .settings import (
    ABLATIONS,
    COMPARED,
    CONTROLS,
    EARLY,
    EXAMPLES,
    FINAL_PLACES,
    FINAL_ROUNDS,
    LANGUAGE,
    MAIN,
    NOISE,
    OTHERS,
    PARTS,
    RANKS,
    ROUNDS,
    SETTINGS,
    WHERE_IT_GAINS,
)

# What the paper reports (arXiv 2603.14228) of the whole method: BoolQ with LLaMA at rank 8 where nothing else is said.
PAPER = {
    "lora": "−2.2",
    "no-gates": "−1.9",
    "gates": "−1.2",
    "adjacency": "−0.8",
    "similarity": "−1.1",
    "2-layers": "−0.9",
    "3-layers": "−1.6",
    "random-filter": "weakest of filters",
    "top-k-filter": "between random and gates",
    "lora-cos": "lower",
    "lora-laplacian": "lower",
}
PAPER_RANKS = {2: "+2.3", 4: "+2.3", 8: "+2.2", 16: "+1.4", 32: "+0.9"}  # over LoRA
PAPER_GRADIENT_COSINE = {BASE: "0.27 to 0.41", OURS: "0.55 to 0.69"}
PAPER_COST = {OURS: ("1.06x", "1.04x")}  # LLaMA-7B on a GPU

Place = tuple[Setting, float]  # a setting and a learning rate


def tables(lines: list[dict], measured_cost: dict) -> dict[str, str]:
    """Every table, by the name of its marks.

    Args:
        lines (`list[dict]`): of the store.
        measured_cost (`dict`): what `benchmarks.cost.overhead` printed.
    """
    runs, every_seed = test_runs(lines), Runs(lines)
    rank_settings = [s for s in runs.settings if (s[0], s[2]) in RANKS]
    few_shot = [s for s in runs.settings if (s[0], s[1]) in EXAMPLES]
    return {
        "main": comparison(runs, SETTINGS, [*MAIN, *CONTROLS]),
        "early": short(runs, EARLY),
        "early-overall": overall(runs, EARLY, [OURS, GATES]),
        "overall-language": overall(runs, [*SETTINGS, *LANGUAGE], [OURS, GATES]),
        "noise": by_place(every_seed, NOISE, FINAL_PLACES, [s for name in FINAL_ROUNDS for s in ROUNDS[name][2]]),
        "overall-coordinator": overall(runs, SETTINGS, [GATES], OURS),
        "overall": overall(runs, SETTINGS, [OURS, GATES, *CONTROLS]),
        "short": short(runs, [*SETTINGS, *LANGUAGE]),
        **{name: search(every_seed, *given) for name, given in ROUNDS.items()},
        "others": comparison(runs, [*COMPARED, EARLY[1]], [BASE, OURS, *OTHERS]),
        "others-overall": overall(runs, COMPARED, [OURS, *OTHERS]),
        "parts": ablations(runs, WHERE_IT_GAINS, [OURS, BASE, *PARTS]),
        "ablations": ablations(runs, COMPARED, [OURS, BASE, *ABLATIONS]),
        "early-ablations": ablations(runs, EARLY[:2], [OURS, BASE, *ABLATIONS]),
        "ranks": short(runs, rank_settings, paper=lambda s: PAPER_RANKS.get(s[1], "")),
        "few-shot": short(runs, few_shot),
        "language": short(runs, LANGUAGE),
        "diagnostics": diagnostics(runs, SETTINGS, [BASE, OURS, *ABLATIONS]),
        "cost": cost(measured_cost),
    }


def comparison(runs: Runs, settings: Iterable[Setting], names: Sequence[str]) -> str:
    """For each setting and method: accuracy, difference, p, NLL, rate, spread over rates, trained parameters."""
    rows = []
    for setting, name, found in _found(runs, settings, names):
        by_rate = runs.over_rates[(*setting, name)]
        rows.append(
            [
                describe(setting),
                label(name),
                len(found),
                _mean_and_sd(found["test.accuracy"]),
                *_difference(runs, setting, name, "accuracy"),
                f"{_mean(found['test.nll']):.3f}",
                *_difference(runs, setting, name, "nll"),
                f"{runs.rates[(*setting, name)]:g}",
                f"{_mean(by_rate):.1f}",
                f"{np.ptp(by_rate):.1f}",
                f"{found['trained'].iloc[0]:,}".replace(",", " "),
            ]
        )
    header = ["task, r, examples", "method", "seeds", "accuracy", "− LoRA", "p (q)", "NLL", "− LoRA", "p (q)", "rate"]
    return markdown([*header, "mean over rates", "spread", "trained"], rows)


def short(runs: Runs, settings: Iterable[Setting], paper: Callable[[Setting], str] | None = None) -> str:
    """LoRA and StructLoRA, and how far StructLoRA without coordinator is from LoRA; one line per setting."""
    rows = []
    for setting in settings:
        if runs.best(setting, OURS).empty:
            continue
        seeds = runs.differences(setting, OURS, "accuracy").index
        accuracy = [_mean_and_sd(runs.best(setting, name).loc[seeds, "test.accuracy"]) for name in (BASE, OURS)]
        row = [describe(setting), len(seeds), *accuracy]
        row += _difference(runs, setting, OURS, "accuracy")
        row += _difference(runs, setting, OURS, "nll")
        row += _difference(runs, setting, GATES, "accuracy")
        rows.append([*row, paper(setting)] if paper else row)
    header = ["task, rank, examples", "seeds", "LoRA", "StructLoRA", "difference", "p (q)", "NLL difference", "p (q)"]
    header += ["without coordinator", "p (q)"]
    return markdown([*header, "paper's difference"] if paper else header, rows)


def overall(runs: Runs, settings: Iterable[Setting], names: Sequence[str], base: str = BASE) -> str:
    """Averages over settings: mean difference, p over seeds (of the average over settings) and p over settings."""
    rows = []
    for name in names:
        accuracy, nll = (_gaps_by_setting(runs, settings, name, figure, base) for figure in ("accuracy", "nll"))
        if accuracy.empty:
            continue
        by_setting = accuracy.mean()
        over_rates = [_mean(runs.over_rates[(*s, name)]) - _mean(runs.over_rates[(*s, base)]) for s in accuracy]
        rows.append(
            [
                label(name),
                len(by_setting),
                *_overall_difference(accuracy, 1),
                f"{(by_setting > 0).sum()} of {len(by_setting)}",
                f"{by_setting.min():+.1f}",
                *_overall_difference(nll, 3),
                f"{_mean(over_rates):+.1f}",
            ]
        )
    other = "LoRA" if base == BASE else "whole"
    p = ["p over seeds (q)", "p over settings (q)"]
    header = ["method", "settings", f"accuracy − {other}", *p, "better on", "worst", f"NLL − {other}", *p]
    return markdown([*header, f"accuracy, mean over rates, − {other}"], rows)


def _gaps_by_setting(runs: Runs, settings: Iterable[Setting], name: str, figure: str, base: str) -> pd.DataFrame:
    """Differences by seed (rows) and setting (columns), of settings with more than one."""
    gaps = {setting: runs.differences(setting, name, figure, base) for setting in settings}
    return pd.DataFrame({setting: d for setting, d in gaps.items() if len(d) > 1})


def _overall_difference(gaps: pd.DataFrame, digits: int) -> list:
    by_setting, by_seed = gaps.mean(), gaps.dropna().mean(axis=1)
    return [f"{_mean(by_setting):+.{digits}f}", P.of(by_seed), P.of(by_setting)]


def ablations(runs: Runs, settings: Iterable[Setting], names: Sequence[str]) -> str:
    """What each part is worth: test figures less those of the whole method, by seed, beside the paper's."""
    rows = []
    for setting, name, found in _found(runs, settings, names):
        row = [describe(setting), label(name), len(found), _mean_and_sd(found["test.accuracy"])]
        for figure in ("accuracy", "nll"):
            row += _difference(runs, setting, name, figure, base=OURS)
        rows.append([*row, f"{runs.rates[(*setting, name)]:g}", PAPER.get(name, "")])
    header = ["task, r, examples", "method", "seeds", "accuracy", "− whole", "p (q)", "NLL − whole", "p (q)", "rate"]
    return markdown([*header, "paper, accuracy − whole"], rows)


def search(runs: Runs, names: Sequence[str], places: Sequence[Place], seeds: Sequence[int]) -> str:
    """Ideas on validation data, at given rates: less LoRA and less the whole method, paired over settings and seeds."""
    found = {name: _at_places(runs, name, places, seeds) for name in (BASE, OURS, *names)}
    rows = []
    for name in dict.fromkeys((BASE, *names)):
        if found[name].index.unique("place").size < len(places):
            continue
        row = [label(name), len(found[name])]
        for figure, digits in (("validation.accuracy", 2), ("validation.nll", 3)):
            row.append(f"{_mean(found[name][figure]):.{digits}f}")
            for base in (BASE, OURS):
                gaps = (found[name][figure] - found[base][figure]).dropna()
                row += [f"{_mean(gaps):+.{digits}f}", P.of(gaps)] if len(gaps) and name != base else ["", ""]
        rows.append(row)
    header = ["setting", "runs", "accuracy", "− LoRA", "p (q)", "− whole", "p (q)"]
    return markdown([*header, "NLL", "− LoRA", "p (q)", "− whole", "p (q)"], rows)


def _at_places(runs: Runs, name: str, places: Sequence[Place], seeds: Sequence[int]) -> pd.DataFrame:
    """Runs of a method by the number of the place and seed."""
    found = pd.concat(
        {number: runs.at(setting, name, lr) for number, (setting, lr) in enumerate(places)}, names=["place"]
    )
    return found[found.index.isin(seeds, level="seed")]


def by_place(runs: Runs, names: Sequence[str], places: Sequence[Place], seeds: Sequence[int]) -> str:
    """The same ideas at each place by itself: validation accuracy less that of gates at their default, paired over seeds."""
    found = {name: _at_places(runs, name, places, seeds)["validation.accuracy"] for name in (GATES, *names)}
    rows = []
    for number, (setting, lr) in enumerate(places):
        row = [describe(setting), f"{lr:g}"]
        for name in names:
            gaps = (found[name] - found[GATES]).dropna()
            gaps = gaps[gaps.index.get_level_values("place") == number]
            row += [len(gaps), f"{_mean(gaps):+.1f}", P.of(gaps)] if len(gaps) else ["", "", ""]
        rows.append(row)
    labels = [label(name).removeprefix(f"{label(GATES)}, ") for name in names]
    columns = [column for name in labels for column in ("seeds", f"{name}, − gates", "p (q)")]
    return markdown(["task, r, examples", "rate", *columns], rows)


def diagnostics(runs: Runs, settings: Iterable[Setting], names: Sequence[str]) -> str:
    """Figures of structure at the chosen rates, mean over settings and seeds, beside the paper's."""
    figures = ("relative_drift", "gradient_cosine", "update_cosine", "moved_A_cosine", "first_singular_share")
    columns = [f"diagnostics.{figure}" for figure in figures]
    rows = []
    for name in names:
        found = pd.concat([runs.best(setting, name) for setting in settings])[columns].dropna()
        if len(found):
            means = [f"{_mean(found[column]):.3f}" for column in columns]
            rows.append([label(name), len(found), *means, PAPER_GRADIENT_COSINE.get(name, "")])
    return markdown(["method", "runs", *(f.replace("_", " ") for f in figures), "paper's gradient cosine"], rows)


def cost(measured: dict) -> str:
    """Step time and peak memory relative to LoRA's, as `benchmarks.cost.overhead` measured them in interleaved rounds."""
    rows = []
    for name, ratio in measured["step_time_ratio"].items():
        if name != BASE:
            low, high = measured["step_time_ratio_quartiles"][name]
            memory = measured["peak_memory_ratio"][name]
            own = [f"{ratio:.3f}x", f"{low:.3f} to {high:.3f}", f"{memory:.3f}x"]
            rows.append([label(name), *own, *PAPER_COST.get(name, ("", ""))])
    header = ["method", "step time / LoRA's", "quartiles", "peak memory / LoRA's"]
    return markdown([*header, "paper, time", "paper, memory"], rows)


class P(float):
    """A cell with the p-value of a paired t-test; NaN where there is none: fewer than two pairs, or all of them alike."""

    @classmethod
    def of(cls, gaps: Sequence[float]) -> P:
        gaps = np.asarray(gaps)
        return cls(np.nan if len(gaps) < 2 or np.ptp(gaps) == 0 else ttest_1samp(gaps, 0).pvalue)


def markdown(header: list[str], rows: list[list]) -> str:
    """The table, with q beside every `P`."""
    corrected = _corrected([cell for row in rows for cell in row if isinstance(cell, P)])
    cells = [[next(corrected) if isinstance(cell, P) else str(cell) for cell in row] for row in rows]
    as_they_are = {"stralign": None, "disable_numparse": True}
    return pd.DataFrame(cells, columns=header).to_markdown(index=False, tablefmt="github", **as_they_are)


def _corrected(found: list[P]) -> Iterator[str]:
    """'p (q)' for each."""
    p = np.array(found)
    q = np.full_like(p, np.nan)
    q[~np.isnan(p)] = false_discovery_control(p[~np.isnan(p)])
    for pair in zip(p, q, strict=True):
        yield "–" if np.isnan(pair[0]) else "{} ({})".format(*("<0.001" if x < 0.001 else f"{x:.3f}" for x in pair))


def describe(setting: Setting) -> str:
    return ", ".join(map(str, setting))


def label(name: str) -> str:
    return methods.find(name).summary


def _found(
    runs: Runs, settings: Iterable[Setting], names: Sequence[str]
) -> Iterator[tuple[Setting, str, pd.DataFrame]]:
    """Setting, method and runs at the chosen rate, of what was run."""
    for setting in settings:
        for name in names:
            if not (found := runs.best(setting, name)).empty:
                yield setting, name, found


def _difference(runs: Runs, setting: Setting, name: str, figure: str, base: str = BASE) -> list:
    gaps = runs.differences(setting, name, figure, base)
    if name == base or gaps.empty:
        return ["", ""]
    digits = {"accuracy": 1, "nll": 3}[figure]
    return [f"{_mean(gaps):+.{digits}f}", P.of(gaps)]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(np.asarray(values)))


def _mean_and_sd(values: Sequence[float]) -> str:
    return f"{_mean(values):.1f}" + (f" ± {np.std(np.asarray(values), ddof=1):.1f}" if len(values) > 1 else "")
