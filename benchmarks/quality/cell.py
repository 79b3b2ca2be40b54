"""One cell: one task, method, rank, number of examples, learning rate and seed -> one line of the store."""

from __future__ import annotations

import time

import torch
from torch.optim.swa_utils import AveragedModel

from . import after_training, methods, pretrain, tasks
from .measures import diagnostics, evaluate, lora_factors, scaled, truncated
from .settings import CUT_SEEDS
from .store import KEY
from .tasks import ViT

# From which on LoRA and StructLoRA are cut after training, and LoRA's update is tried with a scalar.
CUT_RANK = 8
WARMUP = 0.06  # of the steps, as in the paper


def run(task_name: str, method_name: str, rank: int, examples: int, lr: float, seed: int) -> dict:
    """Train once and measure. The same arguments give the same line, except for the seconds."""
    if task_name.partition(tasks.AT_PASSES)[0] not in tasks.TASKS:
        from . import language  # TRL, only where it is needed

        return language.run(task_name, method_name, rank, examples, lr, seed)
    started, cpu_started = time.perf_counter(), time.process_time()
    task, method = tasks.find(task_name, examples), methods.find(method_name)
    torch.manual_seed(seed)  # head, adapter and dropout
    model, optimizer, runtime = method.prepare(task, rank, examples, lr, seed)
    training = task.training_examples(examples, seed)
    warmup = max(1, round(WARMUP * task.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (task.steps - step) / (task.steps - warmup))
    )
    start_A = {name: A.detach().clone() for name, (A, _) in lora_factors(model).items()}
    batches = task.batches(examples, seed)
    selection = method.selection(model, optimizer, training, task, seed)
    average = AveragedModel(model) if method.tail_average else None
    model.train()

    def train(first: int, last: int) -> None:
        for step in range(first, last):
            batch = training[selection.examples(step, batches[step]) if selection else batches[step]]
            loss = model(**batch.inputs, labels=batch.labels).loss
            loss.backward()
            if selection:
                selection.gather(step, batch)
            optimizer.step()
            if average and 2 * step >= task.steps:
                average.update_parameters(model)
            schedule.step()
            if hasattr(model.base_model, "update_and_allocate"):
                model.base_model.update_and_allocate(step)  # AdaLoRA prunes here, while gradients stand
            optimizer.zero_grad()

    if selection:
        selection.until_cut(train, schedule, (task_name, rank, examples, lr, seed))
        selection.cut_now()
    train(selection.end if selection else 0, task.steps)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = sum(
        p.numel() for name, p in model.named_parameters() if p.requires_grad and f".{task.head}." in name
    )
    own = sum(p.numel() for m in runtime.maps for p in m.parameters()) if runtime else 0
    training_seconds = time.process_time() - cpu_started + (selection.cpu_seconds if selection else 0)
    _, validation, test = task.load()
    model = (average.module if average else model).eval()
    line = dict(zip(KEY, (task_name, method_name, rank, examples, lr, seed), strict=True))
    line |= {
        "validation": evaluate(model, validation),
        "test": evaluate(model, test),
        "steps": task.steps,
        "batch": task.batch,
        "trained": selection.parameters() if selection else trained - head + own,
        "head": head,
        "structlora": method.options(),
        **({"backbone": pretrain.fingerprint(task.build.steps)} if isinstance(task.build, ViT) else {}),
        "diagnostics": diagnostics(model, start_A, validation) if task.diagnosed and not selection else {},
        "cpu_seconds": round(training_seconds, 2),
        "seconds": round(time.perf_counter() - started, 2),
    }
    if runtime:
        line["diagnostics"] |= {
            name.removeprefix("structlora/"): round(value, 4)
            for name, value in runtime.metrics().items()
            if name.split("/")[1] in ("gate_openness", "kept_share", "kl", "semantic_edges", "theta_norm")
        }
        runtime.detach()
    if selection:
        return line | {"selection": selection.summary()}

    def tested() -> dict:
        return evaluate(model, test)

    if method_name == "lora" and rank >= CUT_RANK:
        figures = scaled(model, line["validation"], lambda: evaluate(model, validation), tested)
        line["scaled"] = figures or {"scale": 1.0, **line["test"]}
    if method_name in ("lora", "structlora") and rank >= CUT_RANK and seed in CUT_SEEDS:
        line["cut"] = after_training.cut(model, training, validation, seed, tested)
    if "keep" in (method.structlora or {}):
        return line  # its directions are fewer already
    return line | truncated(model, rank, tested)
