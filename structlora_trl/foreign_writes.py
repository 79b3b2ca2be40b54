"""LoRA weights that other code writes or replaces: the checks, and the errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, NoReturn

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.tensor import DTensor

from .errors import StructLoRAError


class Owner(NamedTuple):
    """Where a LoRA parameter lies: the module that holds it, its name there, its name in the model, itself."""

    module: nn.Module
    name: str
    path: str
    parameter: nn.Parameter


def owners_of(model: nn.Module, parameters: list[nn.Parameter]) -> list[Owner]:
    """Where some parameters of a model lie."""
    ours = {id(p) for p in parameters}
    return [
        Owner(module, name, f"{path}.{name}" if path else name, p)
        for path, module in model.named_modules()
        for name, p in module._parameters.items()
        if id(p) in ours
    ]


def in_graphs(parameters: list[nn.Parameter]) -> set[int]:
    """The ids of parameters that are read by some autograd graph which is still alive."""
    return {id(p) for p in parameters if p.requires_grad and _is_in_graph(p)}


def _is_in_graph(parameter: nn.Parameter) -> bool:
    """A parameter's node lives as long as a graph that ends in it: is it the same one when asked twice?"""
    with torch.enable_grad():
        get_gradient_edge(parameter).node.metadata[__name__] = True
        return __name__ in get_gradient_edge(parameter).node.metadata


def refuse_replaced(owners: list[Owner]) -> None:
    """Stop where modules of the model hold other LoRA parameters than the optimizer steps.

    Raises:
        StructLoRAError: they do, after `load_state_dict(assign=True)` for instance.
    """
    _refuse_others((owner.module._parameters.get(owner.name), owner.parameter) for owner in owners)


def refuse_replaced_by_name(model: nn.Module, owners: list[Owner]) -> None:
    """`refuse_replaced` by the names in the model, which finds new modules too; slower."""
    named = dict(model.named_parameters())
    _refuse_others((named.get(owner.path), owner.parameter) for owner in owners)


def _refuse_others(pairs: Iterable[tuple[nn.Parameter | None, nn.Parameter]]) -> None:
    replaced = 0
    for now, ours in pairs:
        # FSDP2 shows its gathered copies, which are no DTensors, from a forward until its backward.
        is_gathered = isinstance(ours, DTensor) and not isinstance(now, DTensor)
        replaced += now is not None and now is not ours and not is_gathered
    if replaced:
        raise StructLoRAError(
            f"{replaced} LoRA parameters of the model replaced by others since StructLoRA was attached",
            "the parameters that the optimizer steps",
            "load weights into them (`load_state_dict` without `assign=True`), or `detach()`, build the optimizer of the new "
            "ones and attach again",
        )


def refuse_changed() -> NoReturn:
    """At a training forward: other evaluation weights stand than StructLoRA wrote."""
    raise StructLoRAError(
        "LoRA weights that other code has written since the last optimizer step",
        "the evaluation weights that StructLoRA put there; values that are swapped out (a moving average, say) must be back "
        "before the next training forward",
        "call `runtime.reload()` to start again from the weights that stand, or load the run's own state after them "
        "(`load_state`, or `accelerator.register_for_checkpointing(runtime)`)",
    )


def refuse_early_graph(count: int) -> NoReturn:
    """At the first training forward: a graph reads LoRA weights that training weights are about to replace."""
    raise StructLoRAError(
        f"a computation on {count} LoRA parameters, made before the first training forward, whose graph is still alive",
        "no graph of LoRA weights when a training forward replaces them: a backward through it would fail with `modified by "
        "an inplace operation`",
        "compute a penalty on LoRA weights after the model's forward, or call `runtime.train()` before it; compute what needs "
        "no gradient under `torch.no_grad()`",
    )


def refuse_write_before_step(optimizer: str) -> NoReturn:
    """Training weights were written between a forward and its step."""
    raise StructLoRAError(
        f"LoRA weights that were written between a training forward and the step of {optimizer}",
        f"the weights that the gradients are taken at, which {optimizer}.step replaces",
        "write to them after the step, before the next forward, and call `runtime.reload()`; or attach to the optimizer "
        "whose `step` is called (SAM, which takes gradients at perturbed weights, needs the perturbed loss from "
        "`torch.func.functional_call`); to drop what was written, `runtime.load_state_dict(runtime.state_dict())`",
    )
