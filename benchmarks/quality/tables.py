"""The tables, as Markdown. Everything but the search is of the test split.

p is of a two-sided paired t-test. In brackets after it, p corrected for the number of p-values in its table. q is by Benjamini
and Hochberg: of the differences with q < 0.05, at most one in twenty is expected to be chance. The second is by Holm: of all
tables of pure noise, one in twenty has a figure below 0.05.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, ttest_1samp
from scipy.stats import t as student

from . import after_training, heldout, methods, shrinking
from .selection import BASE, GATES, OURS, Runs, Setting, quarter_runs, size_rate, test_runs
from .settings import (
    ABLATIONS,
    AGAINST,
    AIMS,
    BY_INFORMATION,
    CHANCE,
    COMPARED,
    CONTROLS,
    EARLY,
    EQUAL_PLACES,
    EQUAL_RULES,
    EQUAL_SEEDS,
    EVIDENCE,
    EVIDENCE_SEEDS,
    EXAMPLES,
    FAIR,
    FAIR_GROUPS,
    FINAL_PLACES,
    FINAL_ROUNDS,
    LANGUAGE,
    LANGUAGE_SIZE_SEEDS,
    LANGUAGE_SIZES,
    MAIN,
    NOISE,
    NOISE_CONTROLS,
    OTHERS,
    OURS_FAIR,
    PARTS,
    QUARTER,
    QUARTER_METHODS,
    RANKS,
    ROUNDS,
    SETTINGS,
    SHRINK,
    SMALLER,
    SMALLER_LANGUAGE,
    SMALLER_RANKS,
    SMALLER_SEEDS,
    SMALLER_SHARES,
    SQUEEZE,
    WHERE_IT_GAINS,
    kept_methods,
    selected,
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

# Figures of runs that are neither of validation nor of test examples as trained, by their column.
ELSEWHERE = {
    "others.tweet": "tweets",
    "others.product": "product reviews",
    "truncated.half": "half the rank",
    "truncated.quarter": "a quarter of the rank",
}

NAMES_OF_SHARES = {share: name for name, share in after_training.SHARES.items()}
RULE_LABELS = {
    "random": "random",
    "snr": "signal to noise of the gate's gradient",
    "true-fisher": "Fisher, labels drawn from the model",
    "fisher": "Fisher, training examples",
    "held-back": "Fisher, held-back examples",
    "gain": "mean gradient of the gate, held-back examples",
    "relative": "Fisher relative to the size of the update",
    "singular": "largest singular values",
    "uniform": "uniform SVD",
    "norm": "top-k norm",
}

# Column of a cut after training, for the name of a share -> what it keeps.
CUT_LABELS = {
    "cut.information.{}": "information of training examples, singular directions",
    "cut.held-out.{}": "information of validation examples, singular directions",
    "cut.singular.{}": "largest singular values",
    "truncated.{}": "uniform SVD",
    "cut.norm.{}": "top-k norm",
    "cut.random.{}": "random",
    "cut.random-singular.{}": "random, singular directions",
}

Place = tuple[Setting, float]  # a setting and a learning rate


def tables(lines: list[dict], measured_cost: dict, measured_coherence: dict) -> dict[str, str]:
    """Every table, by the name of its marks.

    Args:
        lines (`list[dict]`): of the store.
        measured_cost (`dict`): what `benchmarks.cost.overhead` printed.
        measured_coherence (`dict`): what `benchmarks.quality.coherence` kept; empty where it has kept nothing.
    """
    runs, every_seed, at_sizes = test_runs(lines), Runs(lines), quarter_runs(lines)
    rank_settings = [s for s in runs.settings if (s[0], s[2]) in RANKS]
    few_shot = [s for s in runs.settings if (s[0], s[1]) in EXAMPLES]
    return {
        "main": comparison(runs, SETTINGS, [*MAIN, *CONTROLS]),
        "early": short(runs, EARLY),
        "early-overall": overall(runs, EARLY, [OURS, GATES]),
        "overall-language": overall(runs, [*SETTINGS, *LANGUAGE], [OURS, GATES]),
        "noise": by_place(
            every_seed, NOISE, FINAL_PLACES, [s for name in FINAL_ROUNDS for s in ROUNDS[name][2]]
        ),
        "overall-coordinator": overall(runs, SETTINGS, [GATES], OURS),
        "overall": overall(runs, SETTINGS, [OURS, GATES, *NOISE_CONTROLS]),
        "fair": fair(runs, every_seed),
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
        **{
            name: evidence(every_seed, *given, base=AGAINST.get(name, BASE))
            for name, given in EVIDENCE.items()
        },
        "aims": aims(runs, every_seed),
        "equal-size": equal_size(_of_seeds(lines, EQUAL_SEEDS), EQUAL_PLACES),
        "quarter": quarter(at_sizes, QUARTER, QUARTER_METHODS),
        "information": quarter(at_sizes, QUARTER, [BY_INFORMATION, *((name, 8) for name in (OURS, BASE))]),
        **{
            f"at-{share}-of-{rank}": at_equal_size(
                at_sizes, [(task, rank, examples) for task, _, examples in QUARTER], share
            )
            for rank in (8, 16)
            for share in after_training.SHARES
        },
        **{
            f"at-quarter-of-{setting[0]}": at_equal_size(
                _of_seeds(lines, LANGUAGE_SIZE_SEEDS), [setting], "quarter"
            )
            for setting in LANGUAGE_SIZES
        },
        **{
            f"smaller-{keep:g}-of-{rank}{name}": smaller(_of_seeds(lines, SMALLER_SEEDS), places, rank, keep)
            for rank in SMALLER_RANKS
            for keep in SMALLER_SHARES
            for name, places in (("", SMALLER), ("-language", [SMALLER_LANGUAGE]))
        },
        **{f"{name}-elsewhere": elsewhere(every_seed, *given) for name, given in EVIDENCE.items()},
        "diagnostics": diagnostics(runs, SETTINGS, [BASE, OURS, *ABLATIONS]),
        "cost": cost(measured_cost),
        "coherence": coherence(measured_coherence),
    }


def _of_seeds(lines: list[dict], seeds: Collection[int]) -> Runs | None:
    found = [line for line in lines if line["seed"] in seeds]
    return Runs(found) if found else None


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
    header = [
        "task, r, examples",
        "method",
        "seeds",
        "accuracy",
        "− LoRA",
        "p (q, Holm)",
        "NLL",
        "− LoRA",
        "p (q, Holm)",
        "rate",
    ]
    return markdown([*header, "mean over rates", "spread", "trained"], rows)


def short(runs: Runs, settings: Iterable[Setting], paper: Callable[[Setting], str] | None = None) -> str:
    """LoRA and StructLoRA, and how far StructLoRA without coordinator is from LoRA; one line per setting."""
    rows = []
    for setting in settings:
        if runs.best(setting, OURS).empty:
            continue
        seeds = runs.differences(setting, OURS, "accuracy").index
        accuracy = [
            _mean_and_sd(runs.best(setting, name).loc[seeds, "test.accuracy"]) for name in (BASE, OURS)
        ]
        row = [describe(setting), len(seeds), *accuracy]
        row += _difference(runs, setting, OURS, "accuracy")
        row += _difference(runs, setting, OURS, "nll")
        row += _difference(runs, setting, GATES, "accuracy")
        rows.append([*row, paper(setting)] if paper else row)
    header = [
        "task, rank, examples",
        "seeds",
        "LoRA",
        "StructLoRA",
        "difference",
        "p (q, Holm)",
        "NLL difference",
        "p (q, Holm)",
    ]
    header += ["without coordinator", "p (q, Holm)"]
    return markdown([*header, "paper's difference"] if paper else header, rows)


def overall(runs: Runs, settings: Iterable[Setting], names: Sequence[str], base: str = BASE) -> str:
    """Averages over settings, with and without digits: mean difference, p over seeds and p over settings.

    The p over seeds is of the average over settings, each with its own seeds (`_p_over_seeds`).
    """
    settings = list(settings)
    others = [setting for setting in settings if not setting[0].startswith("digits")]
    rows = []
    for name, group in [(name, group) for name in names for group in (settings, others)]:
        accuracy, nll = (_gaps_by_setting(runs, group, name, figure, base) for figure in ("accuracy", "nll"))
        if not accuracy or (group is others and len(others) in (0, len(settings))):
            continue
        by_setting = np.array([gaps.mean() for gaps in accuracy.values()])
        over_rates = [
            _mean(runs.over_rates[(*s, name)]) - _mean(runs.over_rates[(*s, base)]) for s in accuracy
        ]
        rows.append(
            [
                label(name),
                f"{len(by_setting)} without digits" if group is others else len(by_setting),
                *_overall_difference(accuracy.values(), 1),
                f"{(by_setting > 0).sum()} of {len(by_setting)}",
                f"{by_setting.min():+.1f}",
                *_overall_difference(nll.values(), 3),
                f"{_mean(over_rates):+.1f}",
            ]
        )
    other = "LoRA" if base == BASE else "whole"
    p = ["p over seeds (q, Holm)", "p over settings (q, Holm)"]
    header = ["method", "settings", f"accuracy − {other}", *p, "better on", "worst", f"NLL − {other}", *p]
    return markdown([*header, f"accuracy, mean over rates, − {other}"], rows)


def fair(tuned: Runs, fixed: Runs) -> str:
    """What else regularises LoRA for nothing, and StructLoRA with it: means over settings, less LoRA and of StructLoRA less it.

    Args:
        tuned (`Runs`): of which settings have test figures at the rates that validation chose.
        fixed (`Runs`): of which places have figures of all held-out examples at one rate.
    """
    rows = []
    for group, (settings, places, seeds) in FAIR_GROUPS.items():
        for name in (OURS, *FAIR, *OURS_FAIR):
            compared = (name, BASE, OURS)
            figures = [[_test_figures(tuned.best(setting, n)) for n in compared] for setting in settings]
            figures += [[_held_out(fixed, n, place, seeds) for n in compared] for place in places]
            found = [gaps for of_place in figures if (gaps := _beside(*of_place)) is not None]
            if len(found) < 2:
                continue
            row = [group, label(name), len(found)]
            for column in ("− lora", "structlora −"):
                for figure, digits in (("accuracy", 1), ("nll", 3)):
                    if name == OURS and column == "structlora −":
                        row += ["", "", ""]
                    else:
                        row += _overall_difference([gaps[f"{column} {figure}"] for gaps in found], digits)
            rows.append(row)
    p = ["p over seeds (q, Holm)", "p over settings (q, Holm)"]
    header = ["settings", "method", "number", "accuracy − LoRA", *p, "NLL − LoRA", *p]
    return markdown([*header, "accuracy, StructLoRA − it", *p, "NLL, StructLoRA − it", *p], rows)


def _beside(figures: pd.DataFrame, base: pd.DataFrame, ours: pd.DataFrame) -> pd.DataFrame | None:
    """By seed, figures less `base` and of `ours` less these; None where fewer than two seeds have them all."""
    gaps = {
        f"{column} {figure}": one[figure] - other[figure]
        for column, one, other in (("− lora", figures, base), ("structlora −", ours, figures))
        for figure in ("accuracy", "nll")
    }
    found = pd.DataFrame(gaps).dropna()
    return found if len(found) > 1 else None


def _gaps_by_setting(
    runs: Runs, settings: Iterable[Setting], name: str, figure: str, base: str
) -> dict[Setting, pd.Series]:
    """Differences by seed, of settings with more than one."""
    gaps = {setting: runs.differences(setting, name, figure, base) for setting in settings}
    return {setting: of_seeds for setting, of_seeds in gaps.items() if len(of_seeds) > 1}


def _overall_difference(gaps: Collection[pd.Series], digits: int) -> list:
    """Mean over settings, between which seeds differ, and its p over seeds and over settings."""
    by_setting = [of_seeds.mean() for of_seeds in gaps]
    return [f"{_mean(by_setting):+.{digits}f}", _p_over_seeds(list(gaps)), P.of(by_setting)]


def ablations(runs: Runs, settings: Iterable[Setting], names: Sequence[str]) -> str:
    """What each part is worth: test figures less those of the whole method, by seed, beside the paper's."""
    rows = []
    for setting, name, found in _found(runs, settings, names):
        row = [describe(setting), label(name), len(found), _mean_and_sd(found["test.accuracy"])]
        for figure in ("accuracy", "nll"):
            row += _difference(runs, setting, name, figure, base=OURS)
        rows.append([*row, f"{runs.rates[(*setting, name)]:g}", PAPER.get(name, "")])
    header = [
        "task, r, examples",
        "method",
        "seeds",
        "accuracy",
        "− whole",
        "p (q, Holm)",
        "NLL − whole",
        "p (q, Holm)",
        "rate",
    ]
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
    header = ["setting", "runs", "accuracy", "− LoRA", "p (q, Holm)", "− whole", "p (q, Holm)"]
    return markdown([*header, "NLL", "− LoRA", "p (q, Holm)", "− whole", "p (q, Holm)"], rows)


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
    columns = [column for name in labels for column in ("seeds", f"{name}, − gates", "p (q, Holm)")]
    return markdown(["task, r, examples", "rate", *columns], rows)


def evidence(
    runs: Runs, names: Sequence[str], places: Sequence[Place], seeds: Sequence[int], base: str = BASE
) -> str:
    """At fixed rates and over all held-out examples, each method less `base`: by place, and last over all places.

    The second p of accuracy is over seeds and examples together.
    """
    found = {name: _of_kept(runs, name, places, seeds) for name in (base, *names)}
    rows = []
    over_all: dict[str, list] = {name: [] for name in names}
    for number, (setting, lr) in enumerate(places):
        theirs = found[base].get(number)
        if theirs is None:
            continue
        place = [describe(setting), f"{lr:g}"]
        means = heldout.figures(theirs)
        rows.append([*place, label(base), len(means), *_absolute(means)])
        for name in names:
            ours = found[name].get(number)
            shared = [] if ours is None else ours.index.intersection(theirs.index)
            if len(shared) < 2:
                continue
            pair = ours.loc[shared], theirs.loc[shared]
            gaps = heldout.figures(pair[0]) - heldout.figures(pair[1])
            draws = heldout.resampled(*pair, setting[0])
            over_all[name].append((gaps, draws))
            rows.append([*place, label(name), len(gaps), *_relative(gaps, draws)])
    for name, pairs in over_all.items():
        if len(pairs) == max(map(len, over_all.values())) > 1:
            by_seed = pd.concat([gaps for gaps, _ in pairs], keys=range(len(pairs))).groupby(level=1)
            gaps = by_seed.mean()[by_seed.size() == len(pairs)]
            if len(gaps) > 1:
                draws = np.mean([draws for _, draws in pairs], axis=0)
                rows.append([f"all {len(pairs)}", "", label(name), len(gaps), *_relative(gaps, draws)])
    header = [
        "task, r, examples",
        "rate",
        "method",
        "seeds",
        "accuracy",
        "p (q, Holm)",
        "p over seeds and examples (q, Holm)",
    ]
    return markdown([*header, "NLL", "p (q, Holm)", "ECE"], rows)


def equal_size(runs: Runs, places: dict[Setting, tuple[float, float]]) -> str:
    """Directions selected in training by each rule, and LoRA: test figures, less chance and less LoRA at the small rank.

    Chance is that of the suite's own rules with plain LoRA, and that of the package's selection with gates.

    The rate of LoRA at the small rank is the better of two by its validation accuracy.

    Args:
        runs (`Runs`): all that is stored.
        places (`dict`): setting -> learning rate, share of directions that is kept.
    """
    rows = []
    for setting, (lr, keep) in places.items():
        task, rank, examples = setting
        kept = round(rank * keep)
        of_rules = {rule: runs.at(setting, selected(rule, keep), lr) for rule in EQUAL_RULES}
        whole, small = runs.at(setting, BASE, lr), runs.best((task, kept, examples), BASE)
        found = {
            f"selected: {RULE_LABELS[rule]}": _test_figures(of_rule) for rule, of_rule in of_rules.items()
        }
        bases = (found[f"selected: {RULE_LABELS[CHANCE]}"], _test_figures(small))
        found |= {
            f"LoRA, r {kept}": bases[1],
            f"LoRA, r {rank}": _test_figures(whole),
            f"LoRA, r {rank}, each module cut to r {kept} by SVD after training": _test_figures(
                whole, f"truncated.{NAMES_OF_SHARES[keep]}"
            ),
            f"LoRA, r {rank}, update times a scalar": _test_figures(whole, "scaled"),
        }
        chance = dict.fromkeys(found, bases[0])
        ours = {
            f"{methods.find(name).summary}, r {r}": _test_figures(runs.at((task, r, examples), name, lr))
            for name, r in (*((name, rank) for name in kept_methods(keep)), ("gates", kept))
        }
        by_chance = f"{label(kept_methods(keep)[1])}, r {rank}"
        found, chance = found | ours, chance | dict.fromkeys(ours, ours[by_chance])
        for name, figures in found.items():
            if len(figures):
                row = [describe(setting), name, len(figures), _mean_and_sd(figures["accuracy"])]
                row += [
                    f"{_mean(figures['nll']):.3f}",
                    *_less(figures, chance[name]),
                    *_less(figures, bases[1]),
                ]
                rows.append(row)
    p = "p (q, Holm)"
    header = ["task, r, examples", "method", "seeds", "accuracy", "NLL"]
    of_bases = [
        title
        for base in ("chance", "LoRA at the small rank")
        for title in (f"accuracy − {base} (pairs)", p, f"NLL − {base}", p)
    ]
    return markdown([*header, *of_bases], rows) if rows else "No runs are kept yet."


def quarter(runs: Runs | None, settings: Iterable[Setting], names: Sequence[tuple[str, int]]) -> str:
    """Test figures of the first of `names` (a method and its rank), each at its own rate, and less those of the others.

    By setting, and last the mean over settings, of the seeds that all of them have. Differences have 95 % intervals.
    """
    if runs is None:
        return "No runs are kept yet."
    ours, *others = names
    rows, over_all = [], {figure: [] for figure in ("accuracy", "nll")}
    for task, _, examples in settings:
        found = {}
        for name, rank in names:
            setting = (task, rank, examples)
            of_method = runs.at(setting, name, size_rate(runs, setting, name))
            found[name, rank] = of_method[["test.accuracy", "test.nll"]]
        if any(len(of_method) < 2 for of_method in found.values()):
            continue
        row = [f"{task}, {examples}", len(found[ours]), _mean_and_sd(found[ours]["test.accuracy"])]
        for figure, by_setting in over_all.items():
            gaps = pd.DataFrame({other: (found[ours] - found[other])[f"test.{figure}"] for other in others})
            by_setting.append(gaps.dropna())
            row += _intervals(by_setting[-1], figure)
        rows.append(row)
    if len(rows) > 1:
        means = {figure: sum(found) / len(found) for figure, found in over_all.items()}
        means = {figure: found.dropna() for figure, found in means.items()}
        rows.append([f"mean of {len(rows)}", len(means["accuracy"]), ""])
        for figure, found in means.items():
            rows[-1] += _intervals(found, figure)
    titles = [f"{label(name)}, r {rank}" for name, rank in names]
    header = ["task, examples", "seeds", titles[0]]
    for start in ("", "NLL "):
        header += [cell for title in titles[1:] for cell in (f"{start}− {title}", "p (q, Holm)")]
    return markdown(header, rows) if rows else "No runs are kept yet."


def at_equal_size(runs: Runs | None, settings: Iterable[Setting], share: str) -> str:
    """Adapters with that share of the directions, and whole ones: mean test figures over the settings, each at its own rate.

    Less LoRA trained at that rank, less the adapter that was not cut, and less as many directions drawn at random, with 95 %
    intervals over the seeds that all settings have. What is cut after training has the rate of the whole adapter, other rates
    are as `size_rate` says.

    Args:
        runs (`Runs`, *optional*): of the comparison.
        settings (`Iterable`): (task, rank, examples), of the whole adapter.
        share (`str`): a name of `after_training.SHARES`.
    """
    if runs is None:
        return "No runs are kept yet."
    keep = after_training.SHARES[share]

    def of(method: str, column: str = "test", shrunk: float = 1) -> list[pd.DataFrame]:
        found = []
        for task, rank, examples in settings:
            setting = (task, round(rank * shrunk), examples)
            found.append(_test_figures(runs.at(setting, method, size_rate(runs, setting, method)), column))
        return found

    small, whole = of(BASE, shrunk=keep), {name: of(name) for name in (BASE, OURS)}
    chance = of(f"{OURS}:keep={keep:g},select_by=random")
    rows = [  # name, figures, those of the whole adapter, those of chance
        ("LoRA trained at that rank", small, whole[BASE], None),
        ("AdaLoRA with that target rank", of("adalora", shrunk=keep), whole[BASE], None),
        (f"StructLoRA, keep={keep:g}, by information", of(f"{OURS}:keep={keep:g}"), whole[OURS], chance),
        (f"StructLoRA, keep={keep:g}, random", chance, whole[OURS], None),
    ]
    for name, uncut in whole.items():
        drawn = of(name, f"cut.random.{share}")
        for rule, of_rule in CUT_LABELS.items():
            figures = of(name, rule.format(share))
            control = None if of_rule == CUT_LABELS["cut.random.{}"] else drawn
            rows.append((f"{label(name)}, cut after training: {of_rule}", figures, uncut, control))
    rows += [
        ("LoRA, whole, update times a scalar chosen on validation", of(BASE, "scaled"), whole[BASE], None),
        ("LoRA, whole", whole[BASE], None, None),
        ("StructLoRA, whole", whole[OURS], None, None),
    ]
    cells = []
    for name, figures, *others in rows:
        means = _mean_over_settings(figures)
        if len(means) < 2:
            continue
        row = [name, len(means), f"{_mean(means['accuracy']):.1f}", f"{_mean(means['nll']):.3f}"]
        gaps = [
            None
            if base is None or base is figures
            else _mean_over_settings([one - other for one, other in zip(figures, base, strict=True)])
            for base in (small, *others)
        ]
        for figure in ("accuracy", "nll"):
            for gap in gaps:
                given = ["", ""] if gap is None or len(gap) < 2 else _intervals(gap[[figure]], figure)
                row += given if figure == "accuracy" else given[:1]
        cells.append(row)
    header = ["adapter", "seeds", "accuracy", "NLL"]
    bases = ("LoRA trained at that rank", "the same, whole", "random")
    header += [title for base in bases for title in (f"accuracy − {base}", "p (q, Holm)")]
    return (
        markdown([*header, *(f"NLL − {base}" for base in bases)], cells) if cells else "No runs are kept yet."
    )


def smaller(runs: Runs | None, places: Iterable[tuple[str, int]], rank: int, keep: float) -> str:
    """An adapter of a rank made smaller to a share of it, by rule: mean test figures over the places, less LoRA trained at the
    rank that is left and less the whole adapter, with 95 % intervals over the seeds that all places have.

    Args:
        runs (`Runs`, *optional*): of the comparison.
        places (`Iterable`): (task, examples).
        rank (`int`), keep (`float`): of the whole adapter, and the share.
    """
    if runs is None:
        return "No runs are kept yet."
    small, places = round(rank * keep), [*places]

    def of(method: str, of_rank: int, column: str = "test") -> list[pd.DataFrame]:
        return [
            _test_figures(runs.best((task, of_rank, examples), method), column) for task, examples in places
        ]

    trained, shrunk = of(BASE, small), SHRINK.format(keep)
    whole = of(shrunk, rank)
    rows = [
        (f"LoRA trained at rank {small}", trained),
        ("LoRA-Squeeze to it", of(SQUEEZE.format(small), rank)),
    ]
    for rule in shrinking.RULES:
        for how in ("cut", "distilled"):
            rows.append((f"{rule}, {how}", of(shrunk, rank, f"shrunk.{rule}.{how}")))
    rows.append((f"the whole adapter, rank {rank}", whole))
    cells = []
    for name, figures in rows:
        means = _mean_over_settings(figures)
        if len(means) < 2:
            continue
        row = [name, len(means), f"{_mean(means['accuracy']):.1f}", f"{_mean(means['nll']):.3f}"]
        for base in (trained, whole):
            gaps = _mean_over_settings([one - other for one, other in zip(figures, base, strict=True)])
            row += (
                ["", ""] if base is figures or len(gaps) < 2 else _intervals(gaps[["accuracy"]], "accuracy")
            )
        cells.append(row)
    titles = [f"− LoRA trained at {small}", "p (q, Holm)", "− the whole", "p (q, Holm)"]
    return (
        markdown(["adapter", "seeds", "accuracy", "NLL", *titles], cells)
        if cells
        else "No runs are kept yet."
    )


def _mean_over_settings(figures: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The mean of the tables over settings, of the seeds that all of them have."""
    return (sum(figures) / len(figures)).dropna()


def _intervals(gaps: pd.DataFrame, figure: str) -> list:
    """Of each column its mean with a 95 % interval over seeds, and p."""
    digits, cells = {"accuracy": 1, "nll": 3}[figure], []
    for name in gaps:
        of_seeds = gaps[name]
        reach = student.ppf(0.975, len(of_seeds) - 1) * of_seeds.std(ddof=1) / len(of_seeds) ** 0.5
        low, high = of_seeds.mean() - reach, of_seeds.mean() + reach
        cells += [f"{of_seeds.mean():+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})", P.of(of_seeds)]
    return cells


def _less(figures: pd.DataFrame, base: pd.DataFrame) -> list:
    """Mean differences of accuracy and NLL, paired by seed, each with its p; the first ± its standard error."""
    gaps = (figures - base).dropna()
    if figures is base or gaps.empty:
        return [""] * 4
    error = f" ± {gaps['accuracy'].std(ddof=1) / len(gaps) ** 0.5:.1f}" if len(gaps) > 1 else ""
    accuracy = f"{_mean(gaps['accuracy']):+.1f}{error} ({len(gaps)})"
    return [accuracy, P.of(gaps["accuracy"]), f"{_mean(gaps['nll']):+.3f}", P.of(gaps["nll"])]


def _test_figures(runs: pd.DataFrame, column: str = "test") -> pd.DataFrame:
    """'accuracy' and 'nll' by seed, of the columns of that name; none where they were not kept."""
    names = ["accuracy", "nll"]
    columns = [f"{column}.{name}" for name in names]
    if not {*columns} <= {*runs.columns}:
        return pd.DataFrame(columns=names, dtype=float)
    return runs[columns].dropna().set_axis(names, axis=1)


def aims(tuned: Runs, fixed: Runs) -> str:
    """StructLoRA less LoRA over groups of settings: averages, and the worst of them.

    Args:
        tuned (`Runs`): of which settings have test figures at each method's own rate.
        fixed (`Runs`): of which places have figures of all held-out examples at one rate.
    """
    rows = []
    for name, (settings, places) in AIMS.items():
        found = {setting: _gaps_tuned(tuned, setting) for setting in settings}
        found |= {place: _gaps_fixed(fixed, *place) for place in places}
        found = {key: pair for key, pair in found.items() if len(pair[0]) > 1}
        if len(found) < 2:
            continue
        gaps = pd.DataFrame({key: of_seeds.mean() for key, (of_seeds, _) in found.items()}).T.reset_index(
            drop=True
        )
        relative = 100 * gaps["nll"] / [base for _, base in found.values()]  # percent
        worst, worst_nll = gaps["accuracy"].idxmin(), relative.idxmax()
        names = [describe(key if isinstance(key[0], str) else key[0]) for key in found]
        rows.append(
            [
                name,
                len(found),
                f"{gaps['accuracy'].mean():+.1f}",
                _p_over_seeds([of_seeds["accuracy"] for of_seeds, _ in found.values()]),
                P.of(gaps["accuracy"]),
                f"{(gaps['accuracy'] > 0).sum()} of {len(gaps)}",
                f"{gaps['accuracy'][worst]:+.1f} ({names[worst]})",
                f"{relative.mean():+.1f} %",
                P.of(relative),
                f"{relative[worst_nll]:+.1f} % ({names[worst_nll]})",
                f"{gaps['ece'].mean():+.1f} ({gaps['ece'].count()})" if gaps["ece"].any() else "",
            ]
        )
    header = [
        "settings",
        "number",
        "accuracy − LoRA",
        "p over seeds (q, Holm)",
        "p over settings (q, Holm)",
        "better on",
    ]
    header += ["worst", "NLL − LoRA", "p over settings (q, Holm)", "worst", "ECE − LoRA (where kept)"]
    return markdown(header, rows)


def _gaps_tuned(runs: Runs, setting: Setting) -> tuple[pd.DataFrame, float]:
    """Differences of test figures by seed, and LoRA's NLL."""
    gaps = pd.DataFrame({figure: runs.differences(setting, OURS, figure) for figure in ("accuracy", "nll")})
    base = runs.best(setting, BASE)["test.nll"]
    return gaps.assign(ece=np.nan), _mean(base[base.index.isin(gaps.index)]) if len(gaps) else np.nan


def _gaps_fixed(runs: Runs, setting: Setting, lr: float) -> tuple[pd.DataFrame, float]:
    """The same over all held-out examples."""
    ours, theirs = (_held_out(runs, name, (setting, lr), EVIDENCE_SEEDS) for name in (OURS, BASE))
    gaps = (ours - theirs).dropna(subset=["accuracy"])
    return gaps, theirs.loc[gaps.index, "nll"].mean()


def _held_out(runs: Runs, name: str, place: Place, seeds: Collection[int]) -> pd.DataFrame:
    """'accuracy', 'nll' and 'ece' over all held-out examples at one rate, by seed; none where it was not run."""
    kept = _of_kept(runs, name, [place], seeds)
    return heldout.figures(kept[0]) if kept else pd.DataFrame(columns=["accuracy", "nll", "ece"], dtype=float)


def _p_over_seeds(gaps: Sequence[pd.Series]) -> P:
    """Of the average over settings that have seeds of their own, by Welch and Satterthwaite."""
    counts = np.array([len(of_seeds) for of_seeds in gaps])
    variances = np.array([of_seeds.var(ddof=1) for of_seeds in gaps]) / counts
    freedom = variances.sum() ** 2 / (variances**2 / (counts - 1)).sum()
    mean = np.mean([of_seeds.mean() for of_seeds in gaps])
    return P(2 * student.sf(abs(mean) * len(gaps) / variances.sum() ** 0.5, freedom))


def elsewhere(runs: Runs, names: Sequence[str], places: Sequence[Place], seeds: Sequence[int]) -> str:
    """At the same rates, on examples of other kinds and with the adapter cut to a part of its rank: LoRA, and others less LoRA."""
    found = {
        (place, name): of_seeds[of_seeds.index.isin(seeds)]
        for place in places
        for name in (BASE, *names)
        if len(of_seeds := runs.at(place[0], name, place[1]))
    }
    columns = [
        c for c in ELSEWHERE if any(f"{c}.nll" in part and part[f"{c}.nll"].any() for part in found.values())
    ]
    rows = []
    for (place, name), ours in found.items():
        theirs = None if name == BASE else found.get((place, BASE), ours.iloc[:0])
        cells = [cell for column in columns for cell in _elsewhere(ours, theirs, column)]
        if any(cells):
            rows.append([describe(place[0]), f"{place[1]:g}", label(name), *cells])
    header = [x for c in columns for x in ("seeds", f"{ELSEWHERE[c]}, accuracy", "p (q, Holm)", "NLL")]
    return markdown(["task, r, examples", "rate", "method", *header], rows)


def _elsewhere(ours: pd.DataFrame, theirs: pd.DataFrame | None, column: str) -> list:
    figures = [f"{column}.{figure}" for figure in ("accuracy", "nll")]
    of_each = (ours[figures] if theirs is None else ours[figures] - theirs[figures]).dropna()
    if len(of_each) < 2:
        return [""] * 4
    accuracy, nll = (of_each[figure] for figure in figures)
    if theirs is None:
        return [len(of_each), _mean_and_sd(accuracy), "", f"{_mean(nll):.3f}"]
    error = accuracy.std(ddof=1) / len(accuracy) ** 0.5
    return [len(of_each), f"{_mean(accuracy):+.1f} ± {error:.1f}", P.of(accuracy), f"{_mean(nll):+.3f}"]


def _absolute(means: pd.DataFrame) -> list:
    # There is none of a text that is written.
    ece = "" if means["ece"].isna().all() else f"{_mean(means['ece']):.1f}"
    return [_mean_and_sd(means["accuracy"]), "", "", f"{_mean(means['nll']):.3f}", "", ece]


def _relative(gaps: pd.DataFrame, draws: np.ndarray) -> list:
    """Mean ± standard error of differences by seed, with their p."""
    error = gaps.std(ddof=1) / len(gaps) ** 0.5
    mean = gaps.mean()
    both = P(heldout.p_of(mean["accuracy"], draws, len(gaps)))
    accuracy = [f"{mean['accuracy']:+.1f} ± {error['accuracy']:.1f}", P.of(gaps["accuracy"]), both]
    ece = "" if gaps["ece"].isna().all() else f"{mean['ece']:+.1f} ± {error['ece']:.1f}"
    return [*accuracy, f"{mean['nll']:+.3f}", P.of(gaps["nll"]), ece]


def _of_kept(runs: Runs, name: str, places: Sequence[Place], seeds: Sequence[int]) -> dict[int, pd.DataFrame]:
    """Runs of a method by number of the place, where any kept which examples were right."""
    found = {}
    for number, (setting, lr) in enumerate(places):
        kept = runs.at(setting, name, lr)
        kept = kept[kept.index.isin(seeds)]
        if "test.right" in kept and len(kept := kept[kept["test.right"].notna()]):
            found[number] = kept
    return found


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
    return markdown(
        ["method", "runs", *(f.replace("_", " ") for f in figures), "paper's gradient cosine"], rows
    )


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


def coherence(found: dict[str, dict[str, list[float]]]) -> str:
    """Cosines over depth by kind, as `benchmarks.quality.coherence` measured them: neighbours, later half, five apart."""
    if not found:
        return "No figures are kept yet: `python -m benchmarks.quality.coherence --keep`."
    pairs = ("neighbours", "later half", "5 apart")
    header = ["kind", *(f"{name}, {which}" for name in found for which in pairs)]
    kinds = next(iter(found.values()))
    return markdown(
        header, [[kind, *(f"{x:.3f}" for by_kind in found.values() for x in by_kind[kind])] for kind in kinds]
    )


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
    """'p (q, Holm)' for each."""
    p = np.array(found)
    q, holm = np.full_like(p, np.nan), np.full_like(p, np.nan)
    known = ~np.isnan(p)
    q[known], holm[known] = false_discovery_control(p[known]), _holm(p[known])
    for figures in zip(p, q, holm, strict=True):
        shown = ["<0.001" if x < 0.001 else f"{x:.3f}" for x in figures]
        yield "–" if np.isnan(figures[0]) else "{} ({}, {})".format(*shown)


def _holm(p: np.ndarray) -> np.ndarray:
    """p corrected by Holm: the smallest times how many there are, the next times one less, and none below a smaller one's."""
    order = p.argsort()
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(np.minimum(p[order] * np.arange(len(p), 0, -1), 1.0))
    return corrected


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
    return f"{_mean(values):.1f}" + (
        f" ± {np.std(np.asarray(values), ddof=1):.1f}" if len(values) > 1 else ""
    )
