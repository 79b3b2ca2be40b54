"""Dropping directions of a finished adapter: a smaller plain LoRA adapter.

Removing row j of a module's lora_A and column j of its lora_B takes exactly that rank-one part out of its
update. Which go:

* `prune`: those whose gate is closed, that is open with a probability σ(φ_j) below a threshold ('topk_norm':
  where the filter has it closed). The gate has made the part small, but where lora_B is coordinated (modules
  that write the residual stream) other directions' messages are in it too: measure what it costs.
* `select`: of any adapter, those that matter least to a task, among the singular directions of each module's
  update: directions depend on the basis, and the update does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from peft import LoraConfig
from torch import Tensor

from ..config import share_to_keep
from ..core.selection import best
from ..errors import StructLoRAError
from .load_adapter import Saved
from .peft_scaling import LORA_NAME, SAMPLER, shares_pattern, with_one_scale, with_singular_directions


@dataclass
class Pruned:
    """A smaller adapter.

    Args:
        lora (`LoraConfig`): with the new ranks in `rank_pattern`; every module's scale is `lora_alpha / r`.
        tensors (`dict[str, Tensor]`): of its adapter file.
        kept (`dict[str, list[list[int]]]`): module -> directions kept, of each of its experts or of itself.
        spared (`list[str]`): modules none of whose directions would stay, and that keep their best one:
            `prune` spares all of them, `select` those that PEFT cannot leave out (experts in one parameter,
            torch's attention, DoRA, biases).
        left_out (`list[str]`): modules without any direction, which the new adapter does not adapt.
        share (`float`, *optional*): of the information, or of the squared singular values, that the
            directions kept carry.
    """

    lora: LoraConfig
    tensors: dict[str, Tensor]
    kept: dict[str, list[list[int]]]
    spared: list[str]
    left_out: list[str] = field(default_factory=list)
    share: float | None = None


def openness(saved: Saved) -> dict[str, Tensor]:
    """Module -> (E or 1, r), the probability that each of its directions is open.

    Raises:
        StructLoRAError: no state, no learned gates, or an adapter that holds base weights (PiSSA, KaSA).
    """
    if saved.maps is None:
        raise StructLoRAError(
            f"no StructLoRA state beside the adapter in {saved.folder}, so that its gates are unknown",
            "structlora.safetensors, which each checkpoint and each output folder of `structlora sft` holds",
            "give a checkpoint of the run that made the adapter, or select with `--keep`, which needs no gates",
        )
    if saved.holds_base_weights:
        raise StructLoRAError(
            "an adapter whose directions began as part of the base weights",
            "directions that start at zero",
            "export without pruning",
        )
    found = {}
    for index in range(len(saved.kinds)):
        gates = saved.gates(index)
        if gates is None:
            raise StructLoRAError(
                f"filter='{saved.config.filter}', which learns no gates",
                "filter 'ib' or 'topk_norm'",
                "select with `--keep`, which needs no gates, or train with gates",
            )
        found |= saved.by_module(index, gates)
    return found


def prune(saved: Saved, threshold: float) -> Pruned:
    """Drop directions whose gate is open with probability below `threshold`.

    Args:
        saved (`Saved`): an adapter with StructLoRA's state.
        threshold (`float`): above 0, at most 1.

    Raises:
        StructLoRAError: a threshold out of range, or as `openness`.
    """
    if not 0 < threshold <= 1:
        raise StructLoRAError(f"a threshold of {threshold}", "a probability above 0, at most 1", "try 0.05")
    kept, spared = {}, []
    for module, gates in openness(saved).items():
        kept[module] = [(row >= threshold).nonzero().flatten().tolist() for row in gates]
        if not any(kept[module]):
            kept[module] = [[int(row.argmax())] for row in gates]
            spared.append(module)
    lora, tensors = with_one_scale(saved.lora, saved.tensors, kept)
    return Pruned(lora, tensors, kept, spared)


def select(saved: Saved, keep: float | str, information: dict[str, Tensor] | None = None) -> Pruned:
    """Keep the singular directions that matter most, over the whole model: ranks differ by module.

    Args:
        saved (`Saved`): any adapter.
        keep (`float` or `str`): a share of all directions, above 0 and at most 1; or, as `"99%"`, the fewest
            that together carry this share of the information.
        information (`dict[str, Tensor]`, *optional*): module -> (E or 1, r), of `gate_information` on the
            same adapter in its singular directions; where omitted, the squared singular values take its
            place.

    Raises:
        StructLoRAError: a share out of range, an adapter that adds nothing, or one whose ranks PEFT needs as
            they are (PiSSA, OLoRA, LoftQ, KaSA).
    """
    share_to_keep(keep)  # refused before the work
    tensors, sigma = with_singular_directions(saved.lora, saved.tensors)
    worth = information or {module: values.square() for module, values in sigma.items()}
    if worth.keys() != sigma.keys():
        differing = min(worth.keys() ^ sigma.keys())
        raise StructLoRAError(
            f"an adapter whose file names other modules than the model that PEFT makes of it ('{differing}')",
            "the names of the model, as this version of PEFT writes them",
            "load it with PEFT, save it again (`PeftModel.from_pretrained(base, folder).save_pretrained(new)`), and export that",
        )
    flat = torch.cat([worth[module].flatten() for module in sigma]).double()  # (directions,)
    total = flat.sum()
    if not total > 0:
        raise StructLoRAError(
            "an adapter none of whose directions changes "
            + ("the loss on these rows" if information else "the model"),
            "a trained adapter",
            "give a checkpoint of a later step, or other rows",
        )
    mask = best(flat, keep)
    parts = mask.split([worth[module].numel() for module in sigma])
    # More than two factors of each module: DoRA's magnitude, a bias.
    more = (name for name in saved.tensors if ".lora_" in name and not LORA_NAME.match(name))
    has_more = saved.lora.bias != "none" or any(SAMPLER not in name for name in more)
    kept, spared, left_out = {}, [], []
    for (module, values), part in zip(sigma.items(), parts, strict=True):
        kept[module] = [row.nonzero().flatten().tolist() for row in part.view_as(values)]
        if not any(kept[module]):
            if has_more or shares_pattern(saved.lora, module, sigma):
                kept[module][0] = [int(worth[module][0].argmax())]
                spared.append(module)
            else:
                left_out.append(module)
    lora, tensors = with_one_scale(saved.lora, tensors, kept)
    return Pruned(lora, tensors, kept, spared, left_out, float(flat[mask].sum() / total))


def size_curve(saved: Saved, count: int = 64) -> list[tuple[float, float]]:
    """What the largest singular values of a smaller adapter keep: points (share of the directions, share of
    the squared norm of the update), evenly spread and with the end; none of an adapter that adds nothing.
    """
    _, sigma = with_singular_directions(saved.lora, saved.tensors)
    energy = torch.cat([values.flatten() for values in sigma.values()]).square().sort(descending=True).values
    if not energy.sum() > 0:
        return []
    carried = (energy.cumsum(0) / energy.sum()).tolist()
    places = torch.linspace(1, len(carried), min(count, len(carried)), dtype=torch.float64, device="cpu")
    return [(place / len(carried), carried[place - 1]) for place in places.round().long().tolist()]
