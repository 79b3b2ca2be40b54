"""Dropping closed directions of a trained adapter: a smaller plain LoRA adapter.

A direction j of a module is closed where its gate is open with probability σ(φ_j) below a threshold ('topk_norm': where the
filter has it closed). Dropping it removes row j of the effective lora_A and column j of the effective lora_B; nothing else
changes, so the update loses exactly that rank-one part. The gate has made it small, but where lora_B is coordinated (modules
that write the residual stream) other directions' messages are in it too: measure what it costs.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft import LoraConfig
from torch import Tensor

from ..core.mapping import by_module
from ..errors import StructLoRAError
from .load_adapter import Saved
from .peft_scaling import with_one_scale


@dataclass
class Pruned:
    """A pruned adapter.

    Args:
        lora (`LoraConfig`): with the new ranks in `rank_pattern`; every module's scale is `lora_alpha / r`.
        tensors (`dict[str, Tensor]`): of its adapter file.
        kept (`dict[str, list[list[int]]]`): module -> directions kept, of each of its experts or of itself.
        spared (`list[str]`): modules whose directions are all closed: the most open one stays, since PEFT knows no rank 0.
    """

    lora: LoraConfig
    tensors: dict[str, Tensor]
    kept: dict[str, list[list[int]]]
    spared: list[str]


def prune(saved: Saved, threshold: float) -> Pruned:
    """Drop directions whose gate is open with probability below `threshold`.

    Args:
        saved (`Saved`): an adapter with StructLoRA's state.
        threshold (`float`): above 0, at most 1.

    Raises:
        StructLoRAError: a threshold out of range; no state, no learned gates, or an adapter that holds base weights (PiSSA, KaSA).
    """
    if not 0 < threshold <= 1:
        raise StructLoRAError(f"a threshold of {threshold}", "a probability above 0, at most 1", "try 0.05")
    if saved.maps is None:
        raise StructLoRAError(
            f"no StructLoRA state beside the adapter in {saved.folder}, so that its gates are unknown",
            "structlora.safetensors, which each checkpoint and each output folder of `structlora sft` holds",
            "give a checkpoint of the run that made the adapter, or export without pruning",
        )
    if any(m.origin_B is not None for m in saved.maps):
        raise StructLoRAError(
            f"an adapter initialised with '{saved.lora.init_lora_weights}', whose directions hold part of the base weights",
            "directions that start at zero",
            "export without pruning",
        )
    kept, spared = {}, []
    for m, latent in zip(saved.maps, saved.latents, strict=True):
        gates = m.openness(latent)
        if gates is None:
            raise StructLoRAError(
                f"filter='{m.config.filter}', which learns no gates",
                "filter 'ib' or 'topk_norm'",
                "export without pruning, or train with gates",
            )
        for module, rows in zip(m.kind.modules, by_module(gates, m.kind), strict=True):
            kept[module] = [(row >= threshold).nonzero().flatten().tolist() for row in rows]
            if not any(kept[module]):
                kept[module] = [[int(row.argmax())] for row in rows]
                spared.append(module)
    lora, tensors = with_one_scale(saved.lora, saved.tensors, kept)
    return Pruned(lora, tensors, kept, spared)
