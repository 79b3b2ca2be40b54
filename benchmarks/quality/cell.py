"""One cell: one task, method, rank, number of examples, learning rate and seed -> one line of the store."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from structlora_trl.runtime import Runtime

from . import after_training, methods, pretrain, tasks
from .measures import BestSoFar, diagnostics, evaluate, figures, logits_of, lora_factors, scaled, tempered
from .settings import CHOOSING
from .store import KEY
from .tasks import Split, Task, vit

WARMUP = 0.06  # of the steps, as in the paper
CHECKS = 10  # of the validation NLL, by a run that stops early


def run(task_name: str, method_name: str, rank: int, examples: int, lr: float, seed: int) -> dict:
    """Train once and measure. The same arguments give the same line, except for the seconds."""
    started, cpu_started = time.perf_counter(), time.process_time()
    method = methods.find(method_name)
    training = tasks.find(task_name, examples).training_examples(examples, seed)
    parts = training.halves() if method.on_halves else (training,)
    task = tasks.find(task_name, len(parts[0]))
    trained, *others = [train(task, method, part, rank, lr, seed) for part in parts]
    training_seconds = time.process_time() - cpu_started
    model, runtime = trained.model.eval(), trained.runtime
    _, validation, test = task.load()
    answers = [(logits_of(model, split), split.labels) for split in (validation, test)]
    head = sum(p.numel() for name, p in model.named_parameters() if f".{task.head}.modules_to_save." in name)
    own = sum(p.numel() for m in runtime.maps for p in m.parameters()) if runtime else 0
    line = dict(zip(KEY, (task_name, method_name, rank, examples, lr, seed), strict=True))
    line |= {
        "validation": figures(*answers[0]),
        "test": figures(*answers[1]),
        "tempered": tempered(*answers),
        "steps": task.steps,
        "batch": task.batch,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad) - head + own,
        "head": head,
        "structlora": method.options(),
        **({"backbone": pretrain.fingerprint()} if task.build is vit else {}),
        "diagnostics": diagnostics(model, trained.start_A, validation) if task.diagnosed else {},
        "cpu_seconds": round(training_seconds, 2),
    }

    def tested() -> dict:
        return evaluate(model, test)

    if method_name == "lora":
        smaller = scaled(model, line["validation"], lambda: evaluate(model, validation), tested)
        line["scaled"] = smaller or {"scale": 1.0, **line["test"]}
    if runtime:
        line["diagnostics"] |= {
            name.removeprefix("structlora/"): round(value, 4)
            for name, value in runtime.metrics().items()
            if name.split("/")[1] in ("semantic_edges", "theta_norm")
        }
        if gates := of_gates(runtime):
            line["gates"] = gates
        if others and gates:
            both = zip(*(_openness(t.runtime) for t in (trained, *others)), strict=True)
            line["halves"] = round(float(spearmanr(list(both)).statistic), 4)
        if gates and not others and seed not in CHOOSING:
            line["cut"] = after_training.cut(model, runtime, training, seed, tested)
    return line | {"seconds": round(time.perf_counter() - started, 2)}


class Trained(NamedTuple):
    """A model at the end of a run, its runtime (detached) and lora_A by module as the run began."""

    model: torch.nn.Module
    runtime: Runtime | None
    start_A: dict[str, Tensor]


def train(task: Task, method: methods.Method, training: Split, rank: int, lr: float, seed: int) -> Trained:
    """Return a model trained on some examples."""
    torch.manual_seed(seed)  # head, adapter, dropout and gates
    model, optimizer, runtime = method.prepare(task, training, rank, lr)
    steps, warmup = task.steps, max(1, round(WARMUP * task.steps))
    schedule = LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    start_A = {name: A.detach().clone() for name, (A, _) in lora_factors(model).items()}
    checks = {round(steps * (i + 1) / CHECKS) for i in range(CHECKS)} if method.stops_early else ()
    best = BestSoFar(model)
    model.train()
    for step, chosen in enumerate(task.batches(len(training), seed), 1):
        batch = training[chosen]
        model(**batch.inputs, labels=batch.labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step in checks:
            best.see(evaluate(model.eval(), task.load()[1])["nll"])
            model.train()
    best.put_back()
    if runtime:
        runtime.detach()
    return Trained(model, runtime, start_A)


def of_gates(runtime: Runtime) -> dict[str, float]:
    """Return mean and deviation of the openness of all directions, and their nats; nothing without gates."""
    found = _openness(runtime)
    if not len(found):
        return {}
    nats = runtime.gating.metrics(runtime.openness())["nats"]
    summary = {"openness": found.mean(), "deviation": found.std(), "nats": torch.tensor(nats)}
    return {name: round(value.item(), 4) for name, value in summary.items()}


def _openness(runtime: Runtime) -> Tensor:
    return torch.cat([torch.empty(0), *runtime.openness().values()])
