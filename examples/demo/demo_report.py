"""The demo's table, its plot and the report around them. Every figure comes from the results of the run."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import numpy as np

from structlora_trl.shrink.figures import Run
from structlora_trl.shrink.inspecting import report
from structlora_trl.shrink.load_adapter import read_saved
from structlora_trl.shrink.page import write_page as write_runs

NAMES = {"base": "base model", "lora": "LoRA", "structlora": "StructLoRA"}
COLOURS = {"lora": "#8a8f98", "structlora": "#c2410c"}
SMOOTHING = 4  # steps to either side in the running mean of a loss curve
LAST = 10  # steps whose mean is the loss at the end
MEASURE = "held-out loss"  # as the report page calls it too

LOSS_PLOT, REPORT, PAGE = "loss.png", "report.md", "report.html"


def table(results: dict[str, dict]) -> str:
    """A Markdown table that also reads well on a terminal."""
    rows = [("", "accuracy", MEASURE, "CPU s per step", "peak memory")]
    for method, result in results.items():
        speed = f"{result['cpu_seconds_per_step']:.2f}" if "cpu_seconds_per_step" in result else "–"
        memory = f"{result['peak_memory'] / 1e9:.2f} GB"
        rows.append(
            (NAMES[method], f"{100 * result['accuracy']:.2f} %", f"{result['nll']:.3f}", speed, memory)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| "
        + " | ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    ]
    lines.insert(
        1,
        "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|",
    )
    return "\n".join(lines)


def write_report(results: dict[str, dict], seed: int, directory: Path) -> None:
    """Write report.md and its plots to the directory."""
    _plot_losses(results, directory / LOSS_PLOT)
    sections = (
        _setting(results, seed),
        table(results),
        _comparison(results),
        _losses(results),
        _learned(directory),
    )
    (directory / REPORT).write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def write_page(directory: Path) -> None:
    """Write report.html: what `structlora inspect structlora --html report.html --against lora` writes."""
    runs = [Run(NAMES[name], read_saved(directory / name)) for name in ("structlora", "lora")]
    write_runs(directory / PAGE, runs)


def append_check(trained: dict, loaded: dict, same: int, directory: Path) -> None:
    """Add to report.md what plain PEFT made of the adapter; `same` answers agreed."""
    accuracies = f"{100 * trained['accuracy']:.2f} % at the end of training, {100 * loaded['accuracy']:.2f} % as loaded"
    section = f"""
## Plain LoRA again
A new process that cannot import `structlora_trl` loaded `structlora/` with plain PEFT. Held-out accuracy: {accuracies};
{same} of {len(loaded["correct"])} sentences have the same verdict.
"""
    with open(directory / REPORT, "a", encoding="utf-8") as report:
        report.write(section)


def _setting(results: dict[str, dict], seed: int) -> str:
    recipe = results["lora"]["recipe"]
    modules = " and ".join(f"`{name}`" for name in recipe["modules"])
    held_out = len(results["base"]["correct"])
    return f"""# LoRA and StructLoRA on film reviews
SmolLM2-135M-Instruct learns to tell positive from negative sentences of film reviews, from {recipe["examples"]} that
people have rated. TRL's `SFTTrainer` makes {recipe["steps"]} steps of {recipe["batch"]} examples, with loss on the
answer tokens alone: rank {recipe["rank"]}, {modules}, learning rate {recipe["learning_rate"]}, seed {seed}.
Both runs have the same arguments; StructLoRA adds `callbacks=[StructLoRACallback()]`.

The table is of {held_out} other sentences. Accuracy: how often the right one of the two answers is the likelier.
Held-out loss: mean negative log-likelihood of the right answer in nats, where the probabilities of the two answers are
scaled to sum to one; `{PAGE}` shows the same number. CPU seconds per step: the median, over all cores; on two idle
cores a step takes about half as long. The two runs follow each other, and other work on the machine lengthens steps, so
that a difference here may be that: for a ratio, run `benchmarks/cost`, which takes steps of both in turn. Peak memory:
of each row's own process."""


def _comparison(results: dict[str, dict]) -> str:
    """How far the two adapters differ on the same sentences, and whether that is more than chance."""
    lora, ours = results["lora"], results["structlora"]
    gained = sum(a > b for a, b in zip(ours["correct"], lora["correct"], strict=True))
    lost = sum(a < b for a, b in zip(ours["correct"], lora["correct"], strict=True))
    verdicts = f"StructLoRA alone is right on {gained} of them, LoRA alone on {lost}"
    difference = np.subtract(ours["nlls"], lora["nlls"])
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    change = f"{difference.mean():+.3f}, with a standard error over sentences of {error:.3f}"
    return f"""{verdicts} (sign test: p = {_sign_test(gained, lost):.2f}).
From LoRA to StructLoRA the held-out loss changes by {change}; less is better.
This is one seed of one small task: a demonstration, not a benchmark."""


def _losses(results: dict[str, dict]) -> str:
    return f"""## Loss
![Training loss over the steps]({LOSS_PLOT})

Mean of the last {LAST} steps: {_last_loss(results["lora"])} with LoRA, {_last_loss(results["structlora"])} with
StructLoRA. The first steps mostly learn the form of the answer (one word, then the end). StructLoRA's training losses
contain the noise of its gates; its held-out losses do not."""


def _last_loss(result: dict) -> str:
    return f"{np.mean(result['losses'][-LAST:]):.3f}"


def _learned(directory: Path) -> str:
    """What the two adapters learned, by kind of module: means over layers."""
    reports = [report(read_saved(directory / name)) for name in ("lora", "structlora")]
    lines = [
        "| module | LoRA: effective rank | norm | StructLoRA: effective rank | norm |",
        "|---|---|---|---|---|",
    ]
    for kinds in zip(*reports, strict=True):
        cells = [
            f"{np.mean([d.effective_rank for d in kind.depths]):.2f} | {np.mean([d.norm for d in kind.depths]):.2f}"
            for kind in kinds
        ]
        lines.append(f"| `{kinds[0].name.rsplit('.', 1)[-1]}` | {' | '.join(cells)} |")
    table = "\n".join(lines)
    return f"""## What was learned
{table}

Effective rank: how many directions an update really uses, between 1 and the rank. Norm: its size. Means over layers; `{PAGE}` shows
each layer."""


def _sign_test(a: int, b: int) -> float:
    """Two-sided exact p that a split as uneven as a : b comes of fair coins."""
    n = a + b
    tail = sum(math.comb(n, i) for i in range(min(a, b) + 1)) / 2**n
    return min(1.0, 2 * tail)


def _plot_losses(results: dict[str, dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for method, colour in COLOURS.items():
        losses = np.array(results[method]["losses"])
        steps = np.arange(1, len(losses) + 1)
        mean = [losses[max(0, i - 1 - SMOOTHING) : i + SMOOTHING].mean() for i in steps]
        axes.plot(steps, losses, color=colour, alpha=0.35, linewidth=1)
        axes.plot(
            steps, mean, color=colour, linewidth=2.2, label=f"{NAMES[method]}: {_last_loss(results[method])}"
        )
    axes.set(
        xlabel="optimizer step",
        ylabel="training loss (nats per answer token)",
        yscale="log",
        xlim=(1, len(steps)),
    )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(f"Loss on the answer tokens (thick: mean of {2 * SMOOTHING + 1} steps)", loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title=f"mean of the last {LAST} steps", alignment="left")
    figure.savefig(path, dpi=150)
