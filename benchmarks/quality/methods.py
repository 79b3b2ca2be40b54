"""The methods: PEFT's as users would call them, StructLoRA, its ablations, and the controls.

Each takes the same frozen backbone and head, learning rate, schedule, steps and batches.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, VeraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import Tensor, nn

from structlora_trl import StructLoRAConfig, attach
from structlora_trl.core.diagnostics import cosines, laplacian, neighbour_products
from structlora_trl.core.gates import Gate
from structlora_trl.core.mapping import DEFAULT_PARTS, Parts
from structlora_trl.core.selection import best

from .measures import kind_of, lora_factors
from .tasks import Task

WEIGHT_DECAY = 0.01
PENALTY_WEIGHT = 0.1


@dataclass
class Method:
    """One row of the tables.

    Args:
        summary (`str`): for the report.
        lora (`dict`): arguments of `LoraConfig` beside rank and targets.
        structlora (`dict`, *optional*): options of StructLoRA that differ from its defaults; None trains without it.
        parts (`Parts`): what StructLoRA is built of.
        penalty (`Callable`, *optional*): model -> what is added to the loss, `PENALTY_WEIGHT` times.
        peft (`Callable`, *optional*): (rank, steps, common arguments) -> another PEFT configuration.
        optimizer (`Callable`, *optional*): (model, rank, lr) -> another optimizer than AdamW.
        weight_decay (`float`): of AdamW.
        tail_average (`bool`): evaluate the mean of the weights over the last half of the steps.
        shrink (`dict`, *optional*): arguments of `shrinking.shrink`: the adapter is made smaller after training.
        squeeze (`dict`, *optional*): `to`, the rank to which it is halved in training (`shrinking.Squeeze`).
    """

    summary: str
    lora: dict = field(default_factory=dict)
    structlora: dict | None = None
    parts: Parts = DEFAULT_PARTS
    penalty: Callable[[nn.Module], Tensor] | None = None
    peft: Callable[[int, int, dict], PeftConfig] | None = None
    optimizer: Callable[[nn.Module, int, float], torch.optim.Optimizer] | None = None
    weight_decay: float = WEIGHT_DECAY
    tail_average: bool = False
    shrink: dict | None = None
    squeeze: dict | None = None

    def prepare(self, task: Task, rank: int, lr: float, passes: float):
        """The model to train, its optimizer and, for StructLoRA, the runtime of a run of so many passes over its examples."""
        common = {"target_modules": list(task.targets), "modules_to_save": [task.head] if task.head else None}
        if self.peft is None:
            config = LoraConfig(r=rank, lora_alpha=2 * rank, **self.lora, **common)
        else:
            config = self.peft(rank, task.steps, common)
        model = get_peft_model(task.build(), config)
        if self.optimizer is None:
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=self.weight_decay)
        else:
            optimizer = self.optimizer(model, rank, lr)
        if self.structlora is None:
            return model, optimizer, None
        given = dict(self.structlora)
        if "keep" in given:  # a loop does not know its length
            given.setdefault("select_at", task.steps // 2)
        return model, optimizer, attach(model, optimizer, passes=passes, parts=self.parts, **given)

    def options(self) -> dict | None:
        """All options of StructLoRA, for the store: what 'defaults' meant when the run was made."""
        return None if self.structlora is None else StructLoRAConfig.build(self.structlora).options()


class RandomGate(Gate):
    """The control of Gaussian gates: a direction is either closed or 1 + α times as strong, of the same mean and variance."""

    def sample(self, activations: Tensor) -> Tensor:
        share = 1 / (1 + self.variance)
        return torch.bernoulli(torch.full_like(super().sample(activations), share)) / share


def by_chance(information: Tensor, keep: float) -> Tensor:
    """The control of selection by information: as many directions, drawn by chance."""
    return best(torch.rand(len(information), dtype=torch.float64), keep)


def _of_neighbours(penalty: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], Tensor]:
    """A static regulariser of the paper: the sum over kinds of a figure of the updates ΔW, by depth (L, d·k)."""

    def of_model(model: nn.Module) -> Tensor:
        kinds: dict[tuple, list[Tensor]] = {}
        for name, (A, B) in lora_factors(model).items():
            kinds.setdefault((kind_of(name), A.shape, B.shape), []).append((B @ A).flatten())
        return sum(penalty(torch.stack(updates)) for updates in kinds.values())

    return of_model


def _ada_lora(rank: int, steps: int, common: dict) -> PeftConfig:
    # The authors' proportions: half as much again to begin with, pruned between a tenth and seven tenths of the run.
    return AdaLoraConfig(
        init_r=-(-3 * rank // 2),
        target_r=rank,
        lora_alpha=2 * rank,
        tinit=steps // 10,
        tfinal=3 * steps // 10,
        deltaT=5,
        total_step=steps,
        **common,
    )


def _vera(rank: int, steps: int, common: dict) -> PeftConfig:
    return VeraConfig(r=64, **common)  # trains vectors only; its rank costs next to nothing


def _lora_plus(model: nn.Module, rank: int, lr: float) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(
        model, optimizer_cls=torch.optim.AdamW, lr=lr, loraplus_lr_ratio=16, weight_decay=WEIGHT_DECAY
    )


def _lora_fa(model: nn.Module, rank: int, lr: float) -> torch.optim.Optimizer:
    return create_lorafa_optimizer(model, r=rank, lora_alpha=2 * rank, lr=lr, weight_decay=WEIGHT_DECAY)


def _ours(summary: str, parts: Parts = DEFAULT_PARTS, **options) -> Method:
    return Method(summary, structlora=options, parts=parts)


METHODS = {
    "lora": Method("LoRA"),
    "lora-dropout-0.1": Method("LoRA, lora_dropout 0.1", {"lora_dropout": 0.1}),
    "lora-dropout-0.3": Method("LoRA, lora_dropout 0.3", {"lora_dropout": 0.3}),
    "lora-dropout-0.5": Method("LoRA, lora_dropout 0.5", {"lora_dropout": 0.5}),
    "lora-decay-0.1": Method("LoRA, weight decay 0.1", weight_decay=0.1),
    "lora-average": Method("LoRA, mean of the weights over the last half", tail_average=True),
    "shrink": Method("LoRA, made smaller after training", shrink={}),
    "squeeze": Method("LoRA-Squeeze", squeeze={}),
    "structlora": _ours("StructLoRA"),  # the defaults: the whole method
    "gates": _ours("StructLoRA without coordinator", coordinator="none"),
    # Ablations, as in the paper
    "no-gates": _ours("coordinator alone, without gates", noise="off"),
    "random-gates": _ours("StructLoRA, gates open or closed by chance", Parts(gate=RandomGate)),
    "random-selection": _ours("StructLoRA, directions kept by chance", Parts(choose=by_chance)),
    "adjacency": _ours("StructLoRA, adjacency edges only", edges="adjacency"),
    "similarity": _ours("StructLoRA, similarity edges only", edges="similarity"),
    "2-layers": _ours("StructLoRA, 2 message-passing layers", coordinator_layers=2),
    "3-layers": _ours("StructLoRA, 3 message-passing layers", coordinator_layers=3),
    "gat": _ours("StructLoRA, GAT", coordinator="gat"),
    "lora-cos": Method(
        "LoRA+Cos", penalty=_of_neighbours(lambda updates: (1 - cosines(neighbour_products(updates))).sum())
    ),
    "lora-laplacian": Method("LoRA+Laplacian", penalty=_of_neighbours(laplacian)),
    # PEFT's other methods
    "rslora": Method("rsLoRA", {"use_rslora": True}),
    "dora": Method("DoRA", {"use_dora": True}),
    "pissa": Method("PiSSA", {"init_lora_weights": "pissa"}),
    "adalora": Method("AdaLoRA", peft=_ada_lora),
    "lora-plus": Method("LoRA+ (ratio 16)", optimizer=_lora_plus),
    "lora-fa": Method("LoRA-FA", optimizer=_lora_fa),
    "vera": Method("VeRA (r = 64)", peft=_vera),
    "structlora-vera": Method("StructLoRA on VeRA (r = 64)", structlora={}, peft=_vera),
}


def find(name: str) -> Method:
    """The method of that name, with options of one's own after a colon.

    `structlora:noise_variance=0.5,edges=adjacency` is StructLoRA with these options; `shrink:keep=0.25` makes the trained
    adapter smaller by all rules, and `squeeze:to=4` squeezes it to rank 4 in training.
    """
    base, _, given = name.partition(":")
    method = METHODS[base]
    if not given:
        return method
    options = {option: _parse(value) for option, value in (part.split("=") for part in given.split(","))}
    changed = next(name for name in ("shrink", "squeeze", "structlora") if getattr(method, name) is not None)
    options = {**getattr(method, changed), **options}
    return replace(method, summary=f"{method.summary}, {given}", **{changed: options})


def _parse(value: str):
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
