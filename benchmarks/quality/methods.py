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

from .directions import Cut, Selection
from .measures import kind_of, lora_factors
from .tasks import Split, Task

WEIGHT_DECAY = 0.01


# Options that no method of the first runs set, and that are kept where one does: loops have noise on, and the gates of heads and
# experts, and the selection of directions, came later.
UNSET = {
    *("seed", "adapter_name", "peft_module", "roles", "noise", "head_gates", "expert_gates"),
    *("keep", "select_at", "select_by"),
}

ONE_A = "x_one_A"  # an option of the suite: all depths of a kind start from one lora_A, though nothing compares them


@dataclass
class Method:
    """One row of the tables.

    Args:
        summary (`str`): for the report.
        lora (`dict`): arguments of `LoraConfig` beside rank and targets.
        structlora (`dict`, *optional*): options of StructLoRA that differ from its defaults; None trains without it.
        peft (`Callable`, *optional*): (rank, steps, common arguments) -> another PEFT configuration.
        optimizer (`Callable`, *optional*): (model, rank, lr) -> another optimizer than AdamW.
        weight_decay (`float`): of AdamW.
        cut (`dict`, *optional*): arguments of `directions.Cut`: directions are selected in training.
        tail_average (`bool`): evaluate the mean of the weights over the last half of the steps.
    """

    summary: str
    lora: dict = field(default_factory=dict)
    structlora: dict | None = None
    peft: Callable[[int, int, dict], PeftConfig] | None = None
    optimizer: Callable[[nn.Module, int, float], torch.optim.Optimizer] | None = None
    weight_decay: float = WEIGHT_DECAY
    cut: dict | None = None
    tail_average: bool = False

    def prepare(self, task: Task, rank: int, examples: int, lr: float, seed: int):
        """The model to train, its optimizer and, for StructLoRA, the runtime."""
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
        self.start(model)
        given = self.given
        if "keep" in given:  # a loop does not know its length
            given.setdefault("select_at", task.steps // 2)
        return model, optimizer, attach(model, optimizer, seed=seed, **given)

    def start(self, model: nn.Module) -> None:
        """What the method changes before StructLoRA is attached.

        Raises:
            SystemExit: the method is an idea of the search, whose code is not kept.
        """
        if unknown := self.ideas.keys() - {ONE_A}:
            raise SystemExit(
                f"{', '.join(unknown)}: ideas of the search, whose runs are in the store but whose code is not kept"
            )
        if self.ideas:
            start_from_one_A(model)

    def selection(self, model, optimizer, training: Split, task: Task, seed: int) -> Selection | None:
        """What chooses directions in training, where the method does."""
        if self.cut is None:
            return None
        return Selection(Cut(**self.cut), model, optimizer, training, task.steps, task.batch, seed)

    @property
    def given(self) -> dict:
        """The options of `StructLoRAConfig` among `structlora`."""
        return {name: value for name, value in self.structlora.items() if not name.startswith("x_")}

    @property
    def ideas(self) -> dict:
        """The rest of `structlora`: what the package does not have."""
        return {name: value for name, value in self.structlora.items() if name.startswith("x_")}

    def options(self) -> dict | None:
        """All options of StructLoRA, for the store: what 'defaults' meant when the run was made."""
        if self.structlora is None:
            return None
        options = StructLoRAConfig.build(self.given).options() | self.ideas
        return {name: value for name, value in options.items() if name not in UNSET or name in self.given}


@torch.no_grad()
def start_from_one_A(model: nn.Module) -> None:
    """Give all modules that differ only in depth, and have equal shapes, the lora_A of the first."""
    first: dict[tuple, Tensor] = {}
    for name, (A, B) in lora_factors(model).items():
        A.copy_(first.setdefault((kind_of(name), A.shape, B.shape), A))


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


def _ours(summary: str, **options) -> Method:
    return Method(summary, structlora=options)


def _gates(summary: str, **options) -> Method:
    """Without the coordinator, and started as with it: so that the coordinator alone is what differs."""
    return _ours(summary, coordinator="none", **{ONE_A: True}, **options)


METHODS = {
    "lora": Method("LoRA"),
    "lora-dropout-0.05": Method("LoRA, lora_dropout 0.05", {"lora_dropout": 0.05}),
    "lora-dropout-0.1": Method("LoRA, lora_dropout 0.1", {"lora_dropout": 0.1}),
    "lora-dropout-0.3": Method("LoRA, lora_dropout 0.3", {"lora_dropout": 0.3}),
    "lora-dropout-0.5": Method("LoRA, lora_dropout 0.5", {"lora_dropout": 0.5}),
    "lora-decay-0.1": Method("LoRA, weight decay 0.1", weight_decay=0.1),
    "lora-average": Method("LoRA, mean of the weights over the last half", tail_average=True),
    "select": Method("LoRA, directions selected in training", cut={}),
    "structlora": _ours("StructLoRA"),  # the defaults: the whole method
    "structlora-dropout-0.1": Method("StructLoRA, lora_dropout 0.1", {"lora_dropout": 0.1}, structlora={}),
    "structlora-average": Method(
        "StructLoRA, mean of the weights over the last half", structlora={}, tail_average=True
    ),
    "gates": _gates("StructLoRA without coordinator"),
    "frozen-logits": _gates("without coordinator, same gate noise, logits never trained", gate_lr=0.0),
    "no-align": _ours(
        "without coordinator, lora_A started anew at each depth", coordinator="none", align_init=False
    ),
    # Ablations, as in the paper
    "no-gates": _ours("coordinator alone, without gates", filter="none"),
    "adjacency": _ours("StructLoRA, adjacency edges only", edges="adjacency"),
    "similarity": _ours("StructLoRA, similarity edges only", edges="similarity"),
    "2-layers": _ours("StructLoRA, 2 message-passing layers", coordinator_layers=2),
    "3-layers": _ours("StructLoRA, 3 message-passing layers", coordinator_layers=3),
    "gat": _ours("StructLoRA, GAT", coordinator="gat"),
    "random-filter": _ours("StructLoRA, random filter", filter="random"),
    "top-k-filter": _ours("StructLoRA, top-k norm filter", filter="topk_norm"),
    "lora-cos": _ours("LoRA+Cos", filter="none", coordinator="none", regularizer="cosine"),
    "lora-laplacian": _ours("LoRA+Laplacian", filter="none", coordinator="none", regularizer="laplacian"),
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

    `structlora:temperature=0.2,edges=adjacency` is StructLoRA with these options; `select:rule=fisher,keep=0.25` selects a
    quarter of the directions by that rule.
    """
    base, _, given = name.partition(":")
    method = METHODS[base]
    if not given:
        return method
    options = dict(part.split("=") for part in given.split(","))
    options = {option: _parse(value) for option, value in options.items()}
    changed = "cut" if method.cut is not None else "structlora"
    return replace(
        method, summary=f"{method.summary}, {given}", **{changed: {**getattr(method, changed), **options}}
    )


def _parse(value: str):
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
