"""Trials of noise on rank activations: y = W x + s B (m * A x), m of mean one, in train() alone. A prototype of forward hooks
over plain LoRA, for questions of form and size that were decided before the package had them.

    python -m benchmarks.quality.noise form          # per example, token or step; Gaussian or Bernoulli; sizes by information
    python -m benchmarks.quality.noise level         # variances at 2, 5, 15 and 50 passes over the examples
    python -m benchmarks.quality.noise schedule      # noise that begins after a third of the run; Gumbel-Softmax
    python -m benchmarks.quality.noise table form    # what the stored runs say

Runs are lines of `trials/noise.jsonl`; those that are there already are skipped.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from . import methods
from .cell import WARMUP
from .measures import evaluate, lora_factors
from .tables import DIGITS
from .tasks import TASKS

TRIALS = Path(__file__).resolve().parent / "trials"
TEMPERATURE = 0.3  # of Gumbel-Softmax


@dataclass(frozen=True)
class Noise:
    """What is drawn.

    Args:
        variance (`float`): of m, whose mean is one. 0 is plain LoRA.
        per (`str`): "example", "token" or "step": what shares a draw.
        law (`str`): "gauss", "bernoulli" (0 or 1 + variance) or "gumbel" (a relaxed Bernoulli over its mean).
        after (`float`): share of the run without noise at its start.
        sized (`bool`): a variance for each direction, from a running Fisher information of its gate, of the same mean openness
            1 / (1 + variance).
    """

    variance: float
    per: str = "token"
    law: str = "gauss"
    after: float = 0.0
    sized: bool = False

    def draw(self, rank_activations: Tensor, variance: float | Tensor) -> Tensor:
        """m, which broadcasts to (examples, ..., r)."""
        shape = {
            "token": rank_activations.shape,
            "example": (
                len(rank_activations),
                *[1] * (rank_activations.dim() - 2),
                rank_activations.shape[-1],
            ),
            "step": rank_activations.shape[-1:],
        }[self.per]
        if self.law == "gauss":
            return 1 + variance**0.5 * torch.randn(shape)
        if self.law == "bernoulli":
            return (torch.rand(shape) < 1 / (1 + self.variance)).float() * (1 + self.variance)
        logit, mean = relaxed(self.variance)
        return _relaxed_samples(torch.rand(shape), logit) / mean


def _relaxed_samples(uniform: Tensor, logit: float) -> Tensor:
    return ((uniform.logit(eps=1e-6) + logit) / TEMPERATURE).sigmoid()


@functools.cache
def relaxed(variance: float) -> tuple[float, float]:
    """Logit and mean of the relaxed Bernoulli that has this variance over its squared mean."""
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    low, high = -10.0, 10.0
    for _ in range(50):
        logit = (low + high) / 2
        samples = _relaxed_samples(uniform, logit)
        low, high = (logit, high) if samples.var() / samples.mean() ** 2 > variance else (low, logit)
    return logit, samples.mean().item()


DECAY, MOST = 0.95, 4.0  # of the running Fisher information; the largest variance that it gives


class Hooks:
    """Multiplies what every lora_A gives by a draw, in train() and while `on`."""

    def __init__(self, model: nn.Module, noise: Noise):
        self.noise, self.on = noise, True
        self.factors = list(lora_factors(model).values())
        shape = len(self.factors), len(self.factors[0][0])
        self.variances, self.fisher = torch.full(shape, noise.variance), torch.zeros(shape)
        modules = [module for name, module in model.named_modules() if name.endswith("lora_A.default")]
        for i, module in enumerate(modules):
            module.register_forward_hook(lambda module, _, output, i=i: self._multiply(i, module, output))

    def _multiply(self, i: int, module: nn.Module, output: Tensor) -> Tensor:
        if not (module.training and self.on):
            return output
        return output * self.noise.draw(
            output, self.variances[i] if self.noise.sized else self.noise.variance
        )

    def observe(self) -> None:
        """With the step's gradients in place: sizes follow the information, their mean openness stays."""
        if not self.noise.sized:
            return
        d = torch.stack([(B.grad * B.detach()).sum(0) for _, B in self.factors])
        self.fisher.lerp_(d.square(), 1 - DECAY)
        if not self.fisher.any():
            return  # B is zero still
        low, high = -30.0, 30.0
        for _ in range(40):
            beta = (low + high) / 2
            ratio = torch.tensor(10.0) ** beta / self.fisher.clamp_min(1e-30)
            self.variances = (((1 + 4 * ratio).sqrt() - 1) / 2).clamp_max(MOST)
            more = (1 / (1 + self.variances)).mean() > 1 / (1 + self.noise.variance)
            low, high = (beta, high) if more else (low, beta)


def run(key: dict) -> dict:
    """Train once and measure. `key` has the arguments of `Noise`, and those that `KEY` names."""
    task = TASKS[key["task"]]
    task = replace(task, steps=max(1, round(key["passes"] * key["examples"] / task.batch)))
    noise = Noise(*(key[name] for name in ("variance", "per", "law", "after", "sized")))
    torch.manual_seed(key["seed"])
    method = methods.Method("", {"lora_dropout": key["dropout"]})
    model, optimizer, _ = method.prepare(task, key["rank"], key["lr"], key["passes"])
    hooks = Hooks(model, noise) if noise.variance else None
    training = task.training_examples(key["examples"], key["seed"])
    warmup = max(1, round(WARMUP * task.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (task.steps - step) / max(1, task.steps - warmup))
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sums, averaged = [torch.zeros_like(parameter) for parameter in trained], 0
    started, losses = time.process_time(), []
    model.train()
    for step, batch in enumerate(task.batches(key["examples"], key["seed"])):
        if hooks:
            hooks.on = step >= noise.after * task.steps
        part = training[batch]
        loss = model(**part.inputs, labels=part.labels).loss
        loss.backward()
        if hooks:
            hooks.observe()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if 2 * step >= task.steps:
            averaged += 1
            for total, parameter in zip(sums, trained, strict=True):
                total += parameter.detach()
    seconds = time.process_time() - started
    model.eval()
    _, validation, test = task.load()

    def figures() -> dict:
        found = {"validation": evaluate(model, validation), "test": evaluate(model, test)}
        return {split: {n: v for n, v in of.items() if n != "right"} for split, of in found.items()}

    line = {**key, "steps": task.steps, **figures(), "cpu_seconds": round(seconds, 1)}
    line["train_nll"] = evaluate(model, training)["nll"]
    if key["passes"] < AVERAGED:
        return line
    for total, parameter in zip(sums, trained, strict=True):
        parameter.data.copy_(total / averaged)
    return line | {"average": figures()}


PLACES = {"digits-all": 5e-3, "fashion-all": 2e-3, "movie-all": 2e-3}  # at LoRA's rate
FORMS = (
    {},
    {"variance": 1.0, "per": "token"},
    {"variance": 1.0, "per": "example"},
    {"variance": 1.0, "per": "example", "sized": True},
    {"dropout": 0.5},
    {"variance": 1.0, "per": "token", "law": "bernoulli"},
    {"variance": 0.5, "per": "step"},
)
SEEDS = range(300, 304)
FORM_PASSES = {"digits-all": 50, "fashion-all": 50, "movie-all": 15}


def form() -> list[dict]:
    return [
        {"task": task, "examples": 100, "lr": lr, "seed": seed, "passes": FORM_PASSES[task], **given}
        for seed in SEEDS
        for task, lr in PLACES.items()
        for given in FORMS
    ]


def level() -> list[dict]:
    return [
        {"task": task, "examples": 100, "lr": lr, "seed": seed, "passes": passes, "variance": variance}
        for seed in SEEDS
        for task, lr in PLACES.items()
        for passes, variances in LEVELS.items()
        for variance in variances
    ]


def schedule() -> list[dict]:
    return [
        {"task": task, "examples": 100, "lr": PLACES[task], "seed": seed, "passes": 50, **given}
        for seed in SEEDS[:3]
        for task in ("digits-all", "fashion-all")
        for given in ({}, *({"variance": 1.0, "per": "example", **more} for more in SCHEDULES))
    ]


SCHEDULES = ({}, {"after": 1 / 3}, {"law": "gumbel"})
LEVELS = {5: (0.0, 1.0, 0.25), 15: (0.0, 1.0, 0.25), 2: (0.0, 0.25), 50: (0.0, 1.0, 0.25)}
GRIDS = {"form": form, "level": level, "schedule": schedule}
AVERAGED = 15  # passes, from which on the mean of the weights over the last half is measured too
KEY = (
    "task",
    "rank",
    "examples",
    "lr",
    "seed",
    "passes",
    "variance",
    "per",
    "law",
    "after",
    "sized",
    "dropout",
)
DEFAULTS = {
    "rank": 8,
    "variance": 0.0,
    "per": "token",
    "law": "gauss",
    "after": 0.0,
    "sized": False,
    "dropout": 0.0,
}


def stored(path: Path = TRIALS / "noise.jsonl") -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def work(keys: list[dict], path: Path = TRIALS / "noise.jsonl") -> None:
    """Run what is not stored, in order."""
    path.parent.mkdir(exist_ok=True)
    for i, key in enumerate(keys):
        key = {name: {**DEFAULTS, **key}[name] for name in KEY}
        if any(all(line[name] == key[name] for name in KEY) for line in stored(path)):
            continue
        line = run(key)
        with open(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(line) + "\n")
        print(
            i + 1,
            len(keys),
            {n: key[n] for n in KEY if n not in ("rank", "examples", "lr")},
            line["test"],
            flush=True,
        )


def table(keys: list[dict]) -> None:
    """Means over seeds of all held-out examples, less those of the same run without noise, with their standard errors."""
    lines = {tuple(line[name] for name in KEY): line for line in stored()}
    found: dict[tuple, dict] = {}
    for key in keys:
        key = {name: {**DEFAULTS, **key}[name] for name in KEY}
        line, base = (lines.get(tuple(of.values())) for of in (key, {**key, **NONE}))
        if line and base:
            row = (
                key["task"],
                key["passes"],
                "; ".join(_named(n, key[n]) for n in NONE if key[n] != NONE[n]) or "LoRA",
            )
            found.setdefault(row, {})[key["seed"]] = line, base
    print(
        "| task | passes | noise | seeds | accuracy, NLL, ECE | with a tail average |\n|---|---|---|---|---|---|"
    )
    for row, pairs in sorted(found.items()):
        seeds = ", ".join(map(str, pairs))
        print("|", " | ".join(map(str, row)), "|", seeds, end="")
        for which in ("", "average"):
            shown = all(not which or which in line for line, _ in pairs.values())
            print(" |", "; ".join(_compared(list(pairs.values()), which)) if shown else "", end="")
        print(" |")


def _named(name: str, value) -> str:
    return f"{name} {value:.2g}" if isinstance(value, float) else f"{name} {value}"


NONE = {name: DEFAULTS[name] for name in ("variance", "per", "law", "after", "sized", "dropout")}


def _compared(pairs: list[tuple[dict, dict]], which: str) -> list[str]:
    texts = []
    for name, digits in DIGITS.items():
        ours, base = (
            torch.tensor([_held_out(pair[i], which if i == 0 else "", name) for pair in pairs])
            for i in range(2)
        )
        gap = ours - base
        error = gap.std().item() / len(pairs) ** 0.5 if len(pairs) > 1 else float("nan")
        texts.append(f"{ours.mean():.{digits}f} ({gap.mean():+.{digits}f} ± {error:.{digits}f})")
    return texts


def _held_out(line: dict, which: str, name: str) -> float:
    """Over validation and test examples: nothing is chosen with either."""
    of = line.get(which, line) if which else line
    counts = [len(split) for split in TASKS[line["task"]].load()[1:]]
    return sum(n * of[split][name] for n, split in zip(counts, ("validation", "test"), strict=True)) / sum(
        counts
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", choices=[*GRIDS, "table"])
    what = parser.parse_args().what
    for name in what:
        if name != "table":
            (table if "table" in what else work)(GRIDS[name]())


if __name__ == "__main__":
    main()
