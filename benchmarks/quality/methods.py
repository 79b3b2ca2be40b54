"""The methods: LoRA, what people do against overfitting, StructLoRA and its ablations.

Each takes the same frozen backbone and head, schedule, steps and batches.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

import torch
from peft import LoraConfig, get_peft_model

from structlora_trl import StructLoRAConfig, attach

from .tasks import Split, Task

WEIGHT_DECAY = 0.01


@dataclass
class Method:
    """One row of the tables.

    Args:
        summary (`str`): for the tables.
        lora (`dict`): arguments of `LoraConfig` beside rank and targets.
        structlora (`dict`, *optional*): options of StructLoRA that differ from its defaults; None trains without it.
        weight_decay (`float`): of AdamW.
        stops_early (`bool`): evaluate the weights of lowest validation NLL.
        on_halves (`bool`): train on each half of the examples, and compare the gates.
    """

    summary: str
    lora: dict = field(default_factory=dict)
    structlora: dict | None = None
    weight_decay: float = WEIGHT_DECAY
    stops_early: bool = False
    on_halves: bool = False

    def prepare(self, task: Task, training: Split, rank: int, lr: float):
        """Return the model to train, its optimizer and, for StructLoRA, the runtime."""
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=list(task.targets),
            modules_to_save=[task.head] if task.head else None,
            **self.lora,
        )
        model = get_peft_model(task.build(), config)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=self.weight_decay)
        if self.structlora is None:
            return model, optimizer, None
        given = dict(self.structlora)
        if "keep" in given:  # a loop does not know its length
            given.setdefault("select_at", task.steps // 2)
        # N counts what the loss is a mean of: labels, of which a spelling has several.
        examples = training.label_count
        batch_size = examples * min(1, task.batch / len(training))
        return model, optimizer, attach(model, optimizer, examples=examples, batch_size=batch_size, **given)

    def options(self) -> dict | None:
        """Return all options of StructLoRA, for the store: what 'defaults' meant when the run was made."""
        return None if self.structlora is None else StructLoRAConfig.build(self.structlora).options()


METHODS = {
    "lora": Method("LoRA"),
    **{
        f"lora-dropout-{p}": Method(f"LoRA, lora_dropout {p}", {"lora_dropout": p})
        for p in (0.1, 0.3, 0.5, 0.7)
    },
    "lora-decay-0.1": Method("LoRA, weight decay 0.1", weight_decay=0.1),
    "lora-early": Method("LoRA, early stopping", stops_early=True),
    "structlora": Method("StructLoRA", structlora={}),
    "halves": Method("StructLoRA on each half of the examples", structlora={}, on_halves=True),
}
_LABELS = {
    "coordinator=none": "without coordinator",
    "gates=off": "without gates",
    "gates=gumbel": "Gumbel gates",
    "gate_lr=0,gate_openness=0.5": "noise of one size",
}


def find(name: str) -> Method:
    """Return the method of that name, with options of one's own after a colon: `structlora:beta=0.3,edges=adjacency`."""
    base, _, given = name.partition(":")
    method = METHODS[base]
    if not given:
        return method
    options = {option: _parse(value) for option, value in (part.split("=") for part in given.split(","))}
    return replace(
        method,
        summary=f"{method.summary}, {_LABELS.get(given, given)}",
        structlora=method.structlora | options,
    )


def _parse(value: str):
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
