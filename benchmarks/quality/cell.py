"""One cell: one task, method, rank, number of examples, learning rate and seed -> one line of the store."""

from __future__ import annotations

import time

import torch
from torch.optim.swa_utils import AveragedModel

from . import after_training, methods, pretrain, shrinking, tasks
from .measures import diagnostics, evaluate, figures, logits_of, lora_factors, scaled, tempered, truncated
from .settings import CUT_SEEDS
from .store import KEY
from .tasks import vit

CUT_RANK = 8  # from which on LoRA's update is tried with a scalar, and LoRA is cut after training
WARMUP = 0.06  # of the steps, as in the paper


def run(task_name: str, method_name: str, rank: int, examples: int, lr: float, seed: int) -> dict:
    """Train once and measure. The same arguments give the same line, except for the seconds."""
    if tasks.base_of(task_name) not in tasks.TASKS:
        from . import language  # TRL, only where it is needed

        return language.run(task_name, method_name, rank, examples, lr, seed)
    started, cpu_started = time.perf_counter(), time.process_time()
    task, method = tasks.find(task_name, examples), methods.find(method_name)
    torch.manual_seed(seed)  # head, adapter and dropout
    model, optimizer, runtime = method.prepare(task, rank, lr, passes=tasks.passes_of(task_name, examples))
    training = task.training_examples(examples, seed)
    warmup = max(1, round(WARMUP * task.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (task.steps - step) / (task.steps - warmup))
    )
    start_A = {name: A.detach().clone() for name, (A, _) in lora_factors(model).items()}
    average = AveragedModel(model) if method.tail_average else None
    squeeze = (
        shrinking.Squeeze(model, optimizer, rank, steps=task.steps, **method.squeeze)
        if method.squeeze
        else None
    )
    model.train()
    for step, chosen in enumerate(task.batches(examples, seed)):
        batch = training[chosen]
        loss = model(**batch.inputs, labels=batch.labels).loss
        if method.penalty:
            loss = loss + methods.PENALTY_WEIGHT * method.penalty(model)
        loss.backward()
        optimizer.step()
        if average and 2 * step >= task.steps:
            average.update_parameters(model)
        schedule.step()
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(step)  # AdaLoRA prunes here, while gradients stand
        optimizer.zero_grad()
        if squeeze:
            squeeze.after(step + 1)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = sum(
        p.numel() for name, p in model.named_parameters() if p.requires_grad and f".{task.head}." in name
    )
    own = sum(p.numel() for m in runtime.maps for p in m.parameters()) if runtime else 0
    training_seconds = time.process_time() - cpu_started
    _, validation, test = task.load()
    model = (average.module if average else model).eval()
    answers = [(logits_of(model, split), split.labels) for split in (validation, test)]
    line = dict(zip(KEY, (task_name, method_name, rank, examples, lr, seed), strict=True))
    line |= {
        "validation": figures(*answers[0]),
        "test": figures(*answers[1]),
        "tempered": tempered(*answers),
        "steps": task.steps,
        "batch": task.batch,
        "trained": trained - head + own,
        "head": head,
        "structlora": method.options(),
        **({"backbone": pretrain.fingerprint()} if task.build is vit else {}),
        "diagnostics": diagnostics(model, start_A, validation) if task.diagnosed else {},
        "cpu_seconds": round(training_seconds, 2),
        "seconds": round(time.perf_counter() - started, 2),
    }
    if runtime:
        line["noise"] = runtime.plan.noise
        line["diagnostics"] |= {
            name.removeprefix("structlora/"): round(value, 4)
            for name, value in runtime.metrics().items()
            if name.split("/")[1] in ("kept_share", "semantic_edges", "theta_norm")
        }
        runtime.detach()

    def tested() -> dict:
        return evaluate(model, test)

    if method.shrink:
        line["shrunk"] = shrinking.shrink(model, training, seed=seed, test=tested, **method.shrink)
    if method_name == "lora" and rank >= CUT_RANK:
        smaller = scaled(model, line["validation"], lambda: evaluate(model, validation), tested)
        line["scaled"] = smaller or {"scale": 1.0, **line["test"]}
        if seed in CUT_SEEDS:
            line["cut"] = after_training.cut(model, training, validation, seed, tested)
            line |= truncated(model, rank, tested)
    return line
