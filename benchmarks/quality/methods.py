"""The methods: PEFT's as users would call them, StructLoRA, its ablations, and the controls.

Each takes the same frozen backbone and head, learning rate, schedule, steps and batches.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, VeraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import nn

from structlora_trl import StructLoRAConfig, attach, attachment
from structlora_trl.core.gates import sample_gates
from structlora_trl.core.nodes import Kind, split_depth

from .tasks import Task

WEIGHT_DECAY = 0.01


@dataclass
class Method:
    """One row of the tables.

    Args:
        summary (`str`): for the report.
        lora (`dict`): arguments of `LoraConfig` beside rank and targets.
        structlora (`dict`, *optional*): options of StructLoRA that differ from its defaults; None trains without it.
        peft (`Callable`, *optional*): (rank, steps, common arguments) -> another PEFT configuration.
        optimizer (`Callable`, *optional*): (model, rank, lr) -> another optimizer than AdamW.
    """

    summary: str
    lora: dict = field(default_factory=dict)
    structlora: dict | None = None
    peft: Callable[[int, int, dict], PeftConfig] | None = None
    optimizer: Callable[[nn.Module, int, float], torch.optim.Optimizer] | None = None

    def prepare(self, task: Task, rank: int, lr: float, seed: int):
        """The model to train, its optimizer and, for StructLoRA, the runtime."""
        common = {"target_modules": list(task.targets), "modules_to_save": [task.head]}
        if self.peft is None:
            config = LoraConfig(r=rank, lora_alpha=2 * rank, **self.lora, **common)
        else:
            config = self.peft(rank, task.steps, common)
        model = get_peft_model(task.build(), config)
        if self.optimizer is None:
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=WEIGHT_DECAY)
        else:
            optimizer = self.optimizer(model, rank, lr)
        if self.structlora is None:
            return model, optimizer, None
        with _joined_kinds() if "x_join_kinds" in self.ideas else contextlib.nullcontext():
            runtime = attach(model, optimizer, seed=seed, **self.given)
        self.try_ideas(runtime, task.steps)
        return model, optimizer, runtime

    @property
    def given(self) -> dict:
        """The options of `StructLoRAConfig` among `structlora`."""
        return {name: value for name, value in self.structlora.items() if name not in IDEAS}

    @property
    def ideas(self) -> dict:
        """The rest of `structlora`: ideas that the package does not have."""
        return {name: value for name, value in self.structlora.items() if name in IDEAS}

    def try_ideas(self, runtime, steps: int) -> None:
        """Change an attached runtime; `x_join_kinds` besides needs `_joined_kinds` while attaching."""
        for name, value in self.ideas.items():
            IDEAS[name](runtime, value, steps)

    def options(self) -> dict | None:
        """All options of StructLoRA, for the store: what 'defaults' meant when the run was made."""
        if self.structlora is None:
            return None
        options = StructLoRAConfig.build(self.given).options() | self.ideas
        return {name: value for name, value in options.items() if name not in ("seed", "adapter_name", "roles")}


# Ideas tried that the package does not have: name -> what to do to the runtime once it is attached.


def _start_theta(runtime, value: float, steps: int) -> None:
    """Θ from a multiple of the identity. Harmless to outputs where the features start at zero (fresh readers)."""
    for m in runtime.maps:
        for coordinator in m.coordinators.values():
            coordinator.theta.data += value * torch.eye(coordinator.theta.shape[-1])


def _fade_noise(runtime, share: float, steps: int) -> None:
    """Sampled gates to begin with, giving way to their probabilities over the last `share` of the run."""
    _blend_gates(runtime, lambda step: (steps - step) / (share * steps))


def _warm_noise(runtime, share: float, steps: int) -> None:
    """Gates' probabilities to begin with, giving way to sampled gates over the first `share` of the run."""
    _blend_gates(runtime, lambda step: step / (share * steps))


def _blend_gates(runtime, share_sampled: Callable[[int], float]) -> None:
    for m in runtime.maps:

        def gates(latent, noise, gates=m.gates):
            still = gates(latent, None)
            if noise is None:
                return still
            return still + min(1.0, share_sampled(runtime.step)) * (gates(latent, noise) - still)

        m.gates = gates


def _share_noise(runtime, value: bool, steps: int) -> None:
    """One noise draw for all depths of a kind."""
    draw = runtime._noise
    runtime._noise = lambda: [n[:1].expand_as(n) for n in draw()]


def _normalise(runtime, value: bool, steps: int) -> None:
    """Message passing turns features and leaves their norm at each depth: it cannot act as a larger learning rate."""
    for m in runtime.maps:
        for coordinator in m.coordinators.values():

            def added(features, graph, passed=coordinator.forward):
                mixed = features + passed(features, graph)
                norms = ((x.square().sum((1, 2), keepdim=True) + 1e-12).sqrt() for x in (features, mixed))
                before, after = norms
                return mixed * (before / after) - features

            coordinator.forward = added


def _diagonal_theta(runtime, value: bool, steps: int) -> None:
    """Directions are passed on to the same direction of other depths alone."""
    for m in runtime.maps:
        for coordinator in m.coordinators.values():

            def aggregate(features, graph, layer, theta, aggregate=coordinator.aggregate):
                return aggregate(features, graph, layer, theta * torch.eye(len(theta)))

            coordinator.aggregate = aggregate


def _signed_edges(runtime, value: bool, steps: int) -> None:
    """Edges carry the sign of the cosine of the features they join: what neighbours agree on but for its sign adds up."""
    for m in runtime.maps:
        for coordinator in m.coordinators.values():

            def aggregate(features, graph, layer, theta):
                unit = torch.nn.functional.normalize(features.detach().flatten(1), dim=1)
                signs = torch.where(unit @ unit.T < 0, -1.0, 1.0)
                mixed = (graph.propagate(torch.eye(len(signs))[:, None])[:, 0] * signs) @ features.flatten(1)
                return theta.T @ mixed.view_as(features)

            coordinator.aggregate = aggregate


def _gate_by(m, logits_of: Callable[[], torch.Tensor]) -> None:
    """Let a map's gates follow other logits than its own."""

    def gates(latent, noise):
        logits = logits_of()
        open_ = torch.sigmoid(logits) if noise is None else sample_gates(logits, noise, m.config.temperature)
        return open_ / m.initial_gate

    m.gates = gates


def _smooth_gates(runtime, value: bool, steps: int) -> None:
    """Gates of logits averaged over each depth and its neighbours in the graph."""
    for m in runtime.maps:

        def smoothed(m=m):
            joined = m.graph.edges.float().fill_diagonal_(1.0)
            return (joined / joined.sum(1, keepdim=True)) @ m.logits

        _gate_by(m, smoothed)


def _share_over_kinds(runtime, value: bool, steps: int) -> None:
    """All kinds of a depth are gated by the mean of their logits."""
    for m in runtime.maps:

        def shared(m=m):
            return torch.stack([m.logits, *(o.logits.detach() for o in runtime.maps if o is not m)]).mean(0)

        _gate_by(m, shared)


@contextlib.contextmanager
def _joined_kinds():
    """While attaching: kinds of equal shapes that read the residual stream are one kind, with one A₀ and one Θ."""
    find = attachment.discover

    def discover(model, adapter_name):
        shapes = defaultdict(list)
        for kind in find(model, adapter_name):
            shapes[tuple(kind.shape)].append(kind)
        return [
            Kind(
                "+".join(kind.name for kind in alike),
                *([x for kind in alike for x in getattr(kind, part)] for part in ("modules", "A", "B")),
            )
            for alike in shapes.values()
        ]

    attachment.discover = discover
    try:
        yield
    finally:
        attachment.discover = find


def _join_kinds(runtime, value: bool, steps: int) -> None:
    """Edges of a joined kind: neighbours in depth within a kind, and modules of one depth across kinds."""
    for m in runtime.maps:
        places = [split_depth(module) for module in m.kind.modules]
        edges = [
            [
                (one == other and abs(depth[0] - theirs[0]) == 1) or (one != other and depth == theirs)
                for other, theirs in places
            ]
            for one, depth in places
        ]
        m.graph.fixed = torch.tensor(edges)
        m.graph._refresh()


IDEAS: dict[str, Callable] = {
    "x_diagonal": _diagonal_theta,
    "x_join_kinds": _join_kinds,
    "x_sign": _signed_edges,
    "x_smooth_gates": _smooth_gates,
    "x_normalise": _normalise,
    "x_theta": _start_theta,
    "x_fade_noise": _fade_noise,
    "x_warm_noise": _warm_noise,
    "x_share_kinds": _share_over_kinds,
    "x_share_noise": _share_noise,
}


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


def _coordinated(summary: str, **options) -> Method:
    return _ours(summary, coordinator="gcn", **options)


METHODS = {
    "lora": Method("LoRA"),
    "lora-dropout-0.05": Method("LoRA, lora_dropout 0.05", {"lora_dropout": 0.05}),
    "lora-dropout-0.1": Method("LoRA, lora_dropout 0.1", {"lora_dropout": 0.1}),
    "structlora": _ours("StructLoRA, the defaults"),
    "coordinated": _coordinated("StructLoRA with coordinator"),
    "frozen-logits": _ours("StructLoRA, same gate noise, logits never trained", gate_lr=0.0),
    "no-align": _ours("StructLoRA, lora_A started anew at each depth", align_init=False),
    # Ablations of the method with its coordinator, as in the paper
    "no-gates": _coordinated("coordinator alone, without gates", filter="none"),
    "adjacency": _coordinated("with coordinator, adjacency edges only", edges="adjacency"),
    "similarity": _coordinated("with coordinator, similarity edges only", edges="similarity"),
    "2-layers": _coordinated("with coordinator, 2 message-passing layers", coordinator_layers=2),
    "3-layers": _coordinated("with coordinator, 3 message-passing layers", coordinator_layers=3),
    "gat": _ours("with coordinator, GAT", coordinator="gat"),
    "random-filter": _coordinated("with coordinator, random filter", filter="random"),
    "top-k-filter": _coordinated("with coordinator, top-k norm filter", filter="topk_norm"),
    "lora-cos": _ours("LoRA+Cos", filter="none", regularizer="cosine"),
    "lora-laplacian": _ours("LoRA+Laplacian", filter="none", regularizer="laplacian"),
    # PEFT's other methods
    "rslora": Method("rsLoRA", {"use_rslora": True}),
    "dora": Method("DoRA", {"use_dora": True}),
    "pissa": Method("PiSSA", {"init_lora_weights": "pissa"}),
    "adalora": Method("AdaLoRA", peft=_ada_lora),
    "lora-plus": Method("LoRA+ (ratio 16)", optimizer=_lora_plus),
    "lora-fa": Method("LoRA-FA", optimizer=_lora_fa),
    "vera": Method("VeRA (r = 64)", peft=_vera),
}


def find(name: str) -> Method:
    """The method of that name; `structlora:temperature=0.2,edges=adjacency` is StructLoRA with options of one's own."""
    base, _, given = name.partition(":")
    if not given:
        return METHODS[base]
    options = dict(METHODS[base].structlora)
    for part in given.split(","):
        option, _, value = part.partition("=")
        options[option] = _parse(value)
    return Method(f"{METHODS[base].summary.removesuffix(', the defaults')}, {given}", structlora=options)


def _parse(value: str):
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
