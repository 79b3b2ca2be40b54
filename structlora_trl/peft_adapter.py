"""What PEFT's adapters are like: how they start, and on which of their modules a gate can act."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from peft import LoraConfig, PeftConfig, PeftType
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper, _ConvNd
from torch import nn

from .core.gates import Gate
from .core.kinds import Kind
from .errors import StructLoRAError
from .gating import GatedModule

# Where functions come from that compute a LoRA layer without calling it; and the name of the forward that Unsloth
# gives PEFT's classes, which reads the weight of lora_A alone.
_FUSED = ("axolotl.kernels.lora", "axolotl.monkeypatch.lora_kernels", "unsloth.kernels")
_FUSED_FORWARD = "unsloth_forward"


class Start(NamedTuple):
    """How `init_lora_weights` starts an adapter.

    Args:
        is_zero (`bool`): ΔW is zero because lora_B is, so that each direction starts at nothing.
        is_drawn (`bool`): lora_A is drawn from one distribution at every depth; others put data into it.
        moves_base (`bool`): part of the base weights is moved into the adapter.
        is_repeated (`bool`): PEFT repeats that move when it loads the adapter.
        is_converted (`bool`): PEFT can save the adapter for the base as it was before the move.
    """

    is_zero: bool = False
    is_drawn: bool = False
    moves_base: bool = False
    is_repeated: bool = False
    is_converted: bool = True


# `orthogonal` starts at BA = 0 with both factors other than zero, `mica` at A = 0 with B frozen.
_STARTS = {
    "true": Start(is_zero=True, is_drawn=True),
    "gaussian": Start(is_zero=True, is_drawn=True),
    "false": Start(is_zero=True),  # as it was filled afterwards
    "eva": Start(is_zero=True),
    "orthogonal": Start(),
    "mica": Start(),
    "pissa": Start(moves_base=True, is_repeated=True),
    "pissa_niter": Start(moves_base=True),  # random projections, drawn anew
    "olora": Start(moves_base=True, is_repeated=True),
    "loftq": Start(moves_base=True, is_repeated=True, is_converted=False),
    "corda": Start(moves_base=True),
    "lora_ga": Start(moves_base=True),
}


def start_of(adapter: PeftConfig) -> Start:
    """How an adapter starts. VeRA's scales start alike, and its ΔW at zero.

    Raises:
        StructLoRAError: an initialisation that this version does not know.
    """
    if adapter.peft_type == PeftType.VERA:
        return Start(is_zero=True)
    name = str(adapter.init_lora_weights).lower()
    found = _STARTS.get(re.sub(r"_niter_\d+$", "_niter", name), _STARTS.get(name.split("_")[0]))
    if found is None:
        raise StructLoRAError(
            f"init_lora_weights={adapter.init_lora_weights!r}, which this version does not know",
            f"one of {', '.join(_STARTS)}",
            "choose one of these, or use a newer version of structlora-trl",
        )
    return found


def gates_of(
    model: nn.Module,
    kinds: list[Kind],
    adapter_name: str,
    build: Callable[..., Gate],
) -> tuple[list[GatedModule], dict[str, int]]:
    """Return a gate for each LoRA module on which one can act, and why others have none -> how many."""
    adapter = model.peft_config[adapter_name]
    fused = _fused_modules(model)
    gated, quiet = [], Counter()
    for kind in kinds:
        for place, name in enumerate(kind.modules):
            layer = model.get_submodule(name)
            why = _why_none(layer, adapter, name in fused)
            if why is not None:
                quiet[why] += 1
                continue
            lora_A = layer.lora_A[adapter_name]
            rank_axis = -1 - len(lora_A.kernel_size) if isinstance(layer, _ConvNd) else -1
            factor = next(p for p in (kind.B[place], kind.A[place]) if p.requires_grad)
            gate = build(kind.rank, device=factor.device, rank_axis=rank_axis)
            # DoRA passes the identity through lora_A before its input, to compute the norm of its weights.
            magnitudes = layer.lora_magnitude_vector if isinstance(lora_A, nn.Linear) else {}
            dora = magnitudes[adapter_name] if adapter_name in magnitudes else None
            gated.append(GatedModule(name, lora_A, factor, gate, dora))
    return gated, dict(quiet)


def _why_none(layer: nn.Module, adapter: PeftConfig, is_fused: bool) -> str | None:
    """Why a gate cannot act on a LoRA module; None where it can."""
    if adapter.peft_type == PeftType.VERA:
        return "VeRA"
    if start_of(adapter).moves_base:
        return f"init_lora_weights={adapter.init_lora_weights!r} keeps base weights in the adapter"
    if getattr(adapter, "monteclora_config", None) is not None:  # PEFT 0.20 and later
        return "MonteCLoRA, which has noise of its own on lora_A"
    if getattr(adapter, "velora_config", None) is not None:  # PEFT 0.21 and later
        return "VeLoRA, which computes lora_A by a function of its own"
    if isinstance(layer, ParamWrapper):
        return "experts in one parameter"
    if isinstance(layer, MultiheadAttention):
        return "torch's attention, which merges the adapter"
    if isinstance(layer, LoraLayer) and not layer.lora_A:
        return "embeddings"
    return "fused LoRA kernels" if is_fused else None


def _fused_modules(model: nn.Module) -> set[str]:
    """Names of the modules that Axolotl's or Unsloth's kernels compute without calling them: those within some
    module whose methods were replaced, and those whose class was given another forward.
    """
    fused = [
        f"{name}."
        for name, module in model.named_modules()
        if any(
            str(getattr(value, "__module__", "")).startswith(_FUSED)
            for value in vars(module).values()
            if callable(value)
        )
    ]
    return {
        name
        for name, module in model.named_modules()
        if name.startswith(tuple(fused)) or getattr(type(module).forward, "__name__", None) == _FUSED_FORWARD
    }


def is_lora(adapter: PeftConfig) -> bool:
    """Whether an adapter is plain LoRA; AdaLoRA's configuration is a subclass of LoRA's."""
    return isinstance(adapter, LoraConfig) and adapter.peft_type == PeftType.LORA
