"""Tables and plots from the store, written into the READMEs between their marks.

    python benchmarks/quality/report.py            write them
    python benchmarks/quality/report.py --check    fail where they are not what the store gives

A method's learning rate is the one of best mean validation accuracy over the seeds that all rates were run with, for each
task, rank and number of examples by itself; further seeds are run at that rate alone. Everything else in the tables but
the search is of the test split. Differences are paired by seed: the same examples, the same batches, the same start of
head and adapter. p: two-sided paired t-test.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import methods
import numpy as np
import store
from grids import (
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
    RATES,
    ROUNDS,
    SEEDS,
    SETTINGS,
    WHERE_IT_GAINS,
)
from scipy.stats import ttest_1samp

matplotlib.use("svg")
import matplotlib.pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "structlora"  # the same file from the same store

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DEFAULTS = HERE / "defaults.json"
OVERHEAD = ROOT / "benchmarks" / "overhead.json"  # overhead.py --quick --cpu-time, OMP_NUM_THREADS=1
PAGES = (HERE / "README.md", ROOT / "README.md")
BASE, OURS, FULL = "lora", "structlora", "coordinated"
COLOURS = {"lora": "#777777", "structlora": "#7b3294", "lora-dropout-0.1": "#008837", "coordinated": "#e66101"}

# What the paper reports (arXiv 2603.14228) of the method with its coordinator: BoolQ with LLaMA at rank 8 where nothing
# else is said.
PAPER = {
    "lora": "−2.2",
    "no-gates": "−1.9",
    "structlora": "−1.2",
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
PAPER_GRADIENT_COSINE = {BASE: "0.27 to 0.41", FULL: "0.55 to 0.69"}
PAPER_COST = {FULL: ("1.06x", "1.04x")}  # LLaMA-7B on a GPU

# (setting, method) -> learning rate -> seed -> line; a setting is (task, rank, examples)
Runs = dict[tuple, dict[float, dict[int, dict]]]


def group(lines: list[dict]) -> Runs:
    runs: Runs = defaultdict(lambda: defaultdict(dict))
    for line in sorted(lines, key=store.key_of):  # so that no sum depends on which run ended first
        setting = (line["task"], line["rank"], line["examples"])
        runs[setting, line["method"]][line["lr"]][line["seed"]] = line
    return runs


def test_runs(lines: list[dict]) -> Runs:
    """The runs that test figures are of: without the seeds that served the search alone."""
    return group([line for line in lines if line["seed"] in SEEDS])


def choose_rate(validation: dict[float, dict[int, dict]]) -> float:
    """The learning rate of best mean validation accuracy (then NLL) over the seeds that every rate has been run with.

    Args:
        validation (`dict`): learning rate -> seed -> `accuracy` and `nll` on the validation split.
    """
    shared = set.intersection(*(set(seeds) for seeds in validation.values()))
    if not shared:  # an unfinished grid
        shared = set.union(*(set(seeds) for seeds in validation.values()))
    figures = {lr: [seeds[s] for s in shared if s in seeds] for lr, seeds in validation.items()}
    return max(figures, key=lambda lr: (_mean(figures[lr], "accuracy"), -_mean(figures[lr], "nll")))


def chosen_rate(runs: Runs, setting: tuple, method: str) -> float | None:
    """`choose_rate` for a method at a setting; None where nothing was run."""
    by_rate = runs.get((setting, method))
    if not by_rate:
        return None
    return choose_rate({lr: {s: line["validation"] for s, line in seeds.items()} for lr, seeds in by_rate.items()})


def best(runs: Runs, setting: tuple, method: str) -> tuple[float, dict[int, dict]] | None:
    """The chosen learning rate of a method and its test figures by seed; None where nothing was run."""
    lr = chosen_rate(runs, setting, method)
    return None if lr is None else (lr, {seed: line["test"] for seed, line in runs[setting, method][lr].items()})


def differences(runs: Runs, setting: tuple, method: str, figure: str, base: str = BASE) -> dict[int, float]:
    """By seed, how much more of `figure` the method has than `base` on the test split, each at its own rate."""
    theirs, ours = best(runs, setting, base), best(runs, setting, method)
    if theirs is None or ours is None:
        return {}
    return {s: ours[1][s][figure] - theirs[1][s][figure] for s in sorted(ours[1].keys() & theirs[1].keys())}


# Tables


def _found(runs: Runs, settings: list[tuple], names: list[str]):
    """Setting, method, chosen rate and test figures by seed, of what was run."""
    for setting in settings:
        for name in names:
            if (found := best(runs, setting, name)) is not None:
                yield setting, name, *found


def comparison(runs: Runs, settings: list[tuple], names: list[str]) -> str:
    """For each setting and method: accuracy, difference, p, NLL, rate, spread over rates, trained parameters."""
    rows = []
    for setting, name, lr, test in _found(runs, settings, names):
        accuracy, nll = ([t[figure] for t in test.values()] for figure in ("accuracy", "nll"))
        spread = rates_spread(runs, setting, name)
        (any_line, *_) = runs[setting, name][lr].values()
        rows.append(
            [
                describe(setting),
                label(name),
                len(test),
                _mean_and_sd(accuracy),
                *_difference(differences(runs, setting, name, "accuracy"), name, 1),
                f"{np.mean(nll):.3f}",
                *_difference(differences(runs, setting, name, "nll"), name, 3),
                f"{lr:g}",
                f"{np.mean(spread):.1f}",
                f"{np.max(spread) - np.min(spread):.1f}",
                f"{any_line['trained']:,}".replace(",", " "),
            ]
        )
    header = ["task, r, examples", "method", "seeds", "accuracy", "− LoRA", "p", "NLL", "− LoRA", "p", "rate"]
    return table([*header, "mean over rates", "spread", "trained"], rows)


def rates_spread(runs: Runs, setting: tuple, method: str) -> list[float]:
    """Mean test accuracy at each of the rates that all methods were run at, over the seeds that all of them were run with."""
    by_rate = sorted(runs[setting, method].items())
    by_rate = [(lr, seeds) for lr, seeds in by_rate if lr in RATES[setting[0]]] or by_rate
    shared = set.intersection(*(set(seeds) for _, seeds in by_rate)) or None
    return [
        float(np.mean([line["test"]["accuracy"] for s, line in seeds.items() if shared is None or s in shared]))
        for _, seeds in by_rate
    ]


def overall(runs: Runs, settings: list[tuple], names: list[str], base: str = BASE) -> str:
    """Averages over settings: mean difference, p over seeds (of the average over settings) and p over settings."""
    rows = []
    for name in names:
        row = [label(name)]
        for figure, digits in (("accuracy", 1), ("nll", 3)):
            per_setting = {s: differences(runs, s, name, figure, base) for s in settings}
            per_setting = {s: d for s, d in per_setting.items() if len(d) > 1}
            if not per_setting:
                break
            seeds = sorted(set.intersection(*(set(d) for d in per_setting.values())))
            by_seed = [np.mean([d[s] for d in per_setting.values()]) for s in seeds]
            by_setting = [np.mean(list(d.values())) for d in per_setting.values()]
            row += [f"{np.mean(by_setting):+.{digits}f}", _p(by_seed), _p(by_setting)]
            if figure == "accuracy":
                row.insert(1, len(per_setting))
                better = sum(d > 0 for d in by_setting)
                row += [f"{better} of {len(by_setting)}", f"{min(by_setting):+.1f}"]
        else:
            gaps = [np.mean(rates_spread(runs, s, name)) - np.mean(rates_spread(runs, s, base)) for s in per_setting]
            rows.append([*row, f"{np.mean(gaps):+.1f}"])
    other = "LoRA" if base == BASE else "whole"
    header = ["method", "settings", f"accuracy − {other}", "p over seeds", "p over settings", "better on", "worst"]
    last = f"accuracy, mean over rates, − {other}"
    return table([*header, f"NLL − {other}", "p over seeds", "p over settings", last], rows)


def ablations(runs: Runs, settings: list[tuple], names: list[str]) -> str:
    """What each part is worth: test figures less those of the method with its coordinator, by seed, beside the paper's."""
    rows = []
    for setting, name, lr, test in _found(runs, settings, names):
        row = [describe(setting), label(name), len(test), _mean_and_sd([t["accuracy"] for t in test.values()])]
        for figure, digits in (("accuracy", 1), ("nll", 3)):
            gaps = list(differences(runs, setting, name, figure, base=FULL).values())
            row += ["", ""] if name == FULL else [f"{np.mean(gaps):+.{digits}f}", _p(gaps)]
        rows.append([*row, f"{lr:g}", PAPER.get(name, "")])
    header = ["task, r, examples", "method", "seeds", "accuracy", "− whole", "p", "NLL − whole", "p", "rate"]
    return table([*header, "paper, accuracy − whole"], rows)


def search(runs: Runs, names: Sequence[str], places: Sequence[tuple], seeds: Sequence[int]) -> str:
    """Ideas on validation data, at given rates: less LoRA and less StructLoRA with coordinator, paired over settings and seeds."""
    rows = []
    for name in (BASE, *names):
        lines = {
            (place, seed): line for place in places for seed, line in _at(runs, name, place).items() if seed in seeds
        }
        if len({place for place, _ in lines}) < len(places):
            continue
        row = [label(name), len(lines)]
        for figure, digits in (("accuracy", 2), ("nll", 3)):
            row.append(f"{np.mean([line['validation'][figure] for line in lines.values()]):.{digits}f}")
            for base in (BASE, FULL):
                gaps = [gap for place in places for gap in _gaps(runs, name, base, place, seeds, figure)]
                row += [f"{np.mean(gaps):+.{digits}f}", _p(gaps)] if gaps and name != base else ["", ""]
        rows.append(row)
    header = ["setting", "runs", "accuracy", "− LoRA", "p", "− whole", "p"]
    return table([*header, "NLL", "− LoRA", "p", "− whole", "p"], rows)


def by_place(runs: Runs, names: Sequence[str], places: Sequence[tuple], seeds: Sequence[int]) -> str:
    """The same ideas at each place by itself: validation accuracy less that of the defaults, paired over seeds."""
    rows = []
    for place in places:
        row = [describe(place[0]), f"{place[1]:g}"]
        for name in names:
            gaps = _gaps(runs, name, OURS, place, seeds, "accuracy")
            row += [len(gaps), f"{np.mean(gaps):+.1f}", _p(gaps)] if gaps else ["", "", ""]
        rows.append(row)
    columns = [column for name in names for column in ("seeds", f"{label(name)}, − defaults", "p")]
    return table(["task, r, examples", "rate", *columns], rows)


def _gaps(runs: Runs, name: str, base: str, place: tuple, seeds: Sequence[int], figure: str) -> list[float]:
    """By seed, how much more of a validation figure the method has than `base` at a place."""
    ours, theirs = (_at(runs, method, place) for method in (name, base))
    return [ours[s]["validation"][figure] - theirs[s]["validation"][figure] for s in seeds if s in ours and s in theirs]


def _at(runs: Runs, method: str, place: tuple) -> dict[int, dict]:
    """Lines by seed of a method at a setting and learning rate."""
    setting, lr = place
    return runs.get((setting, method), {}).get(lr, {})


def diagnostics(runs: Runs, settings: list[tuple], names: list[str]) -> str:
    """Figures of structure at the chosen rates, mean over settings and seeds, beside the paper's."""
    figures = ("relative_drift", "gradient_cosine", "update_cosine", "moved_A_cosine", "first_singular_share")
    rows = []
    for name in names:
        found = [
            line["diagnostics"]
            for s in settings
            if (chosen := best(runs, s, name))
            for line in runs[s, name][chosen[0]].values()
            if line.get("diagnostics")
        ]
        if found:
            means = [f"{np.mean([d[f] for d in found]):.3f}" for f in figures]
            rows.append([label(name), len(found), *means, PAPER_GRADIENT_COSINE.get(name, "")])
    return table(["method", "runs", *(f.replace("_", " ") for f in figures), "paper's gradient cosine"], rows)


def cost(measured: dict) -> str:
    """Step time and peak memory relative to LoRA's, as `overhead.py` measured them in interleaved rounds."""
    rows = []
    for name, ratio in measured["step_time_ratio"].items():
        if name != BASE:
            low, high = measured["step_time_ratio_quartiles"][name]
            memory = measured["peak_memory_ratio"][name]
            rows.append(
                [
                    label(name),
                    f"{ratio:.3f}x",
                    f"{low:.3f} to {high:.3f}",
                    f"{memory:.3f}x",
                    *PAPER_COST.get(name, ("", "")),
                ]
            )
    header = ["method", "step time / LoRA's", "quartiles", "peak memory / LoRA's"]
    return table([*header, "paper, time", "paper, memory"], rows)


def tables(lines: list[dict]) -> dict[str, str]:
    """Every table, by the name of its marks."""
    runs, every_seed = test_runs(lines), group(lines)
    every = _settings(runs)
    rank_settings = [s for s in every if (s[0], s[2]) in RANKS]
    few_shot = [s for s in every if (s[0], s[1]) in EXAMPLES]
    main = [s for s in SETTINGS if (s, OURS) in runs]
    language = [s for s in LANGUAGE if (s, OURS) in runs]
    others = [s for s in COMPARED if any((s, name) in runs for name in OTHERS)]
    return {
        "main": comparison(runs, main, [*MAIN, *CONTROLS]),
        "early": short(runs, list(EARLY)),
        "early-overall": overall(runs, list(EARLY), [OURS, FULL]),
        "overall-language": overall(runs, [*main, *language], [OURS, FULL]),
        "noise": by_place(every_seed, NOISE, FINAL_PLACES, [s for name in FINAL_ROUNDS for s in ROUNDS[name][2]]),
        "overall-coordinator": overall(runs, main, [OURS], FULL),
        "overall": overall(runs, main, [OURS, FULL, *CONTROLS]),
        "short": short(runs, [*main, *language]),
        **{name: search(every_seed, *given) for name, given in ROUNDS.items()},
        "others": comparison(runs, [*others, EARLY[1]], [BASE, OURS, *OTHERS]),
        "others-overall": overall(runs, others, [OURS, *OTHERS]),
        "parts": ablations(runs, WHERE_IT_GAINS, [FULL, BASE, *PARTS]),
        "ablations": ablations(runs, COMPARED, [FULL, BASE, *ABLATIONS]),
        "early-ablations": ablations(runs, EARLY[:2], [FULL, BASE, *ABLATIONS]),
        "ranks": short(runs, sorted(rank_settings), paper=lambda s: PAPER_RANKS.get(s[1], "")),
        "few-shot": short(runs, sorted(few_shot)),
        "language": short(runs, language),
        "diagnostics": diagnostics(runs, main, [BASE, FULL, *ABLATIONS]),
        "cost": cost(json.loads(OVERHEAD.read_text())),
    }


def short(runs: Runs, settings: list[tuple], paper: Callable[[tuple], str] | None = None) -> str:
    """LoRA and StructLoRA, and how far StructLoRA with coordinator is from LoRA; one line per setting."""
    rows = []
    for setting in settings:
        by_seed = differences(runs, setting, OURS, "accuracy")
        row = [describe(setting), len(by_seed)]
        for name in (BASE, OURS):
            _, test = best(runs, setting, name)
            row.append(_mean_and_sd([test[seed]["accuracy"] for seed in by_seed]))
        row += _difference(by_seed, OURS, 1)
        row += _difference(differences(runs, setting, OURS, "nll"), OURS, 3)
        row += _difference(differences(runs, setting, FULL, "accuracy"), FULL, 1)
        rows.append([*row, paper(setting)] if paper else row)
    header = ["task, rank, examples", "seeds", "LoRA", "StructLoRA", "difference", "p", "NLL difference", "p"]
    header += ["with coordinator", "p"]
    return table([*header, "paper's difference"] if paper else header, rows)


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def describe(setting: tuple) -> str:
    task, rank, examples = setting
    return f"{task}, {rank}, {examples}"


def label(name: str) -> str:
    return methods.find(name).summary


def _mean_and_sd(values: list[float]) -> str:
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def _mean(figures: list[dict], name: str) -> float:
    return float(np.mean([f[name] for f in figures]))


def _difference(by_seed: dict[int, float], name: str, digits: int) -> list[str]:
    if name == BASE or not by_seed:
        return ["", ""]
    return [f"{np.mean(list(by_seed.values())):+.{digits}f}", _p(list(by_seed.values()))]


def _p(gaps: list[float]) -> str:
    if len(gaps) < 2 or np.ptp(gaps) == 0:
        return "–"
    p = ttest_1samp(gaps, 0).pvalue  # of differences: the paired t-test
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


# Plots


def plot_rates(runs: Runs, path: Path) -> None:
    """Test accuracy over the learning rate, one panel per setting."""
    settings = [s for s in SETTINGS if (s, OURS) in runs]
    columns = 4
    rows = -(-len(settings) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(3 * columns, 2.5 * rows), layout="constrained", squeeze=False)
    for axes, setting in zip(panels.flat, settings):
        for name in (*MAIN, CONTROLS[0]):
            by_rate = sorted((lr, seeds) for lr, seeds in runs[setting, name].items() if lr in runs[setting, BASE])
            if not by_rate:
                continue
            accuracy = [[line["test"]["accuracy"] for line in seeds.values()] for _, seeds in by_rate]
            axes.errorbar(
                [lr for lr, _ in by_rate],
                [np.mean(a) for a in accuracy],
                [np.std(a, ddof=1) / math.sqrt(len(a)) if len(a) > 1 else 0 for a in accuracy],
                color=COLOURS.get(name),
                label=label(name),
                marker="o",
                markersize=3.5,
                capsize=2,
            )
        axes.set(xscale="log", title=describe(setting))
        axes.set_xticks(ticks := sorted(runs[setting, BASE]), [f"{lr:g}" for lr in ticks])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    for axes in list(panels.flat)[len(settings) :]:
        axes.set_visible(False)
    panels[0][0].legend(frameon=False, fontsize=7)
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel("test accuracy, %", fontsize=9)
    _save(figure, path)


def plot_differences(runs: Runs, path: Path) -> None:
    """StructLoRA without and with coordinator against LoRA at each one's best rate: mean and 95 % interval over seeds."""
    from scipy.stats import t

    settings = [s for s in (*SETTINGS, *LANGUAGE) if (s, OURS) in runs]
    figure, panels = plt.subplots(1, 2, figsize=(9, 0.42 * len(settings) + 1.2), sharey=True, layout="constrained")
    for axes, (measure, words) in zip(
        panels, (("accuracy", "accuracy, points"), ("nll", "NLL, nats (less is better)"))
    ):
        for shift, name in ((-0.12, OURS), (0.12, FULL)):
            for place, setting in enumerate(settings):
                gaps = list(differences(runs, setting, name, measure).values())
                if len(gaps) < 2:
                    continue
                half = t.ppf(0.975, len(gaps) - 1) * np.std(gaps, ddof=1) / math.sqrt(len(gaps))
                axes.errorbar(
                    np.mean(gaps), place + shift, xerr=half, color=COLOURS[name], marker="o", markersize=5, capsize=2
                )
            axes.plot([], [], color=COLOURS[name], marker="o", label=label(name))
        axes.axvline(0, color="black", linewidth=1)
        axes.set_xlabel(f"difference from LoRA: {words}")
        axes.grid(alpha=0.25, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(settings)), [describe(s) for s in settings])
    panels[0].invert_yaxis()
    panels[1].legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.33))
    _save(figure, path)


def plot_sweeps(runs: Runs, path: Path) -> None:
    """Accuracy over rank, and over the number of examples."""
    sweeps = [("rank", {k: [s for s in _settings(runs) if (s[0], s[2]) == k] for k in RANKS}, 1)]
    sweeps += [("training examples", {k: [s for s in _settings(runs) if (s[0], s[1]) == k] for k in EXAMPLES}, 2)]
    panels_wanted = [
        (word, key, found, axis) for word, by, axis in sweeps for key, found in by.items() if len(found) > 1
    ]
    if not panels_wanted:
        return
    figure, panels = plt.subplots(
        1, len(panels_wanted), figsize=(3.2 * len(panels_wanted), 2.8), layout="constrained", squeeze=False
    )
    for axes, (word, key, found, axis) in zip(panels.flat, panels_wanted):
        found = sorted(found, key=lambda s: s[axis])
        for name in (BASE, OURS):
            chosen = [
                (s[axis], [t["accuracy"] for t in best(runs, s, name)[1].values()])
                for s in found
                if best(runs, s, name)
            ]
            axes.errorbar(
                [x for x, _ in chosen],
                [np.mean(a) for _, a in chosen],
                [np.std(a, ddof=1) / math.sqrt(len(a)) for _, a in chosen],
                color=COLOURS[name],
                label=label(name),
                marker="o",
                markersize=3.5,
                capsize=2,
            )
        values = [s[axis] for s in found]
        axes.set(xscale="log", xlabel=word, title=f"{key[0]}, {'examples' if axis == 1 else 'rank'} {key[1]}")
        axes.set_xticks(values, values)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("test accuracy, %")
    panels[0][0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def _settings(runs: Runs) -> list[tuple]:
    return sorted({setting for setting, _ in runs})


def _save(figure, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


# Defaults and pages


def earned_defaults(lines: list[dict]) -> dict:
    """The options that the runs called StructLoRA were made with, and what they are worth against LoRA."""
    ours = [line for line in lines if line["method"] == OURS]
    options = ours[0]["structlora"]
    for line in ours:
        if line["structlora"] != options:
            raise SystemExit(f"runs called StructLoRA with other options than the rest: {store.key_of(line)}")
    runs = test_runs(lines)
    gaps = {
        describe(s): {
            "seeds": len(d),
            "accuracy": round(float(np.mean(list(d.values()))), 3),
            "nll": round(float(np.mean(list(differences(runs, s, OURS, "nll").values()))), 5),
        }
        for s in SETTINGS
        if (d := differences(runs, s, OURS, "accuracy"))
    }
    return {"options": options, "test_difference_from_lora": gaps}


def fill(page: str, found: dict[str, str]) -> str:
    """The page with each table between its marks renewed."""
    for name, text in found.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if start in page:
            before, rest = page.split(start)
            page = f"{before}{start}\n\n{text}\n\n{end}{rest.split(end)[1]}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something would change")
    parser.add_argument("--results", type=Path, help="print the main tables of another store instead")
    options = parser.parse_args()
    if options.results:
        lines = store.read(options.results)
        runs = group(lines)
        names = [*dict.fromkeys(line["method"] for line in lines)]
        print(comparison(runs, _settings(runs), names))
        return
    lines = store.read()
    found = tables(lines)
    wanted = {page: fill(page.read_text(), found) for page in PAGES}
    wanted[DEFAULTS] = json.dumps(earned_defaults(lines), indent=2) + "\n"
    if options.check:
        stale = [str(path.relative_to(ROOT)) for path, text in wanted.items() if path.read_text() != text]
        if stale:
            raise SystemExit(f"not what the store gives: {', '.join(stale)}. Run `make bench-report`.")
        return
    for path, text in wanted.items():
        path.write_text(text)
    runs = test_runs(lines)
    plot_rates(runs, HERE / "plots" / "rates.svg")
    plot_differences(runs, HERE / "plots" / "differences.svg")
    plot_sweeps(runs, HERE / "plots" / "sweeps.svg")
    print(f"{len(lines)} runs; wrote {', '.join(str(p.relative_to(ROOT)) for p in wanted)} and plots/")


if __name__ == "__main__":
    main()
