"""Dropping directions of a finished adapter: a smaller plain LoRA adapter.

Removing row j of a module's lora_A and column j of its lora_B takes exactly that rank-one part out of its
update. Which go:

* `shrink`: all but R of each module, so that all modules have one rank, which is what LoRA servers pay for.
* `select`: those that matter least over the whole model. Ranks differ.
* `prune`: those that add nothing, as `keep` leaves them.

Directions are the singular ones of each module's update: a basis of training is one of many with the same update, in
which no direction can be spared. Where training has learned the openness of gates, each direction of training counts by
it; where rows choose, all count alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor

from ..config import share_to_keep
from ..core.selection import best
from ..errors import StructLoRAError
from .load_adapter import Saved
from .peft_scaling import (
    LORA_NAME,
    by_expert,
    factor_names,
    masked,
    rank_of,
    shares_pattern,
    with_one_scale,
    with_singular_directions,
)


@dataclass
class Pruned:
    """A smaller adapter.

    Args:
        whole (`LoraConfig`): of the adapter that it was made of.
        directions (`dict[str, Tensor]`): of its file, of the shapes that it had, in the basis that directions
            were chosen in.
        kept (`dict[str, Tensor]`): module -> (E or 1, r) of bool, the directions kept of each of its experts or of itself.
        one_rank (`bool`): True if every module is filled up to the largest rank.
        share (`float`, *optional*): what the directions kept carry of `measure`.
        measure (`str`): what they were chosen by.
    """

    whole: LoraConfig
    directions: dict[str, Tensor]
    kept: dict[str, Tensor]
    one_rank: bool = False
    share: float | None = None
    measure: str = "the updates' squared norm"

    def written(self, directions: dict[str, Tensor] | None = None) -> tuple[LoraConfig, dict[str, Tensor]]:
        """Return configuration and file of the smaller adapter, with factors from `directions`, of the shapes of the
        whole one; from its own where omitted.

        Raises:
            StructLoRAError: the adapter holds part of its base weights (PiSSA, OLoRA, LoftQ).
        """
        return with_one_scale(self.whole, directions or self.directions, self.kept, self.one_rank)

    def masked(self) -> dict[str, Tensor]:
        """Return `directions` with zeros in place of those that are not kept: the same adapter, at its old size."""
        return masked(self.whole, self.directions, self.kept)

    @property
    def empty(self) -> list[str]:
        """Modules without any direction: left out, or where all have one rank filled up with zeros."""
        return [module for module, mask in self.kept.items() if not mask.any()]

    @property
    def count(self) -> int:
        """Directions kept."""
        return sum(int(mask.sum()) for mask in self.kept.values())


def prune(saved: Saved, one_rank: bool = False) -> Pruned | None:
    """Drop directions that add nothing: those that `keep` closed while training, whose lora_B is zero.

    Args:
        saved (`Saved`): any adapter.
        one_rank (`bool`, *optional*, defaults to False): fill every module up to the largest rank.

    Returns:
        `Pruned`, or None where every direction adds something.

    Raises:
        StructLoRAError: no direction adds anything.
    """
    adds = {}
    for module, names in factor_names(saved.tensors).items():
        A, B = saved.tensors[names["A"]].flatten(1), saved.tensors[names["B"]].flatten(1)
        in_A = A.any(1).view(-1, rank_of(saved.lora, module))  # (E, r)
        adds[module] = in_A & by_expert(B, len(in_A)).any(1)
    _refuse_nothing(adds)
    if all(bool(mask.all()) for mask in adds.values()):
        return None
    return Pruned(saved.lora, saved.tensors, _at_least_one(saved, adds, adds), one_rank)


def select(
    saved: Saved,
    keep: float | str,
    information: dict[str, Tensor] | None = None,
    max_rank: int | None = None,
    one_rank: bool = False,
) -> Pruned:
    """Keep the directions that matter most, over the whole model: ranks differ by module.

    A module that PEFT cannot leave out (experts in one parameter, torch's attention, DoRA, biases) keeps its best
    direction.

    Args:
        saved (`Saved`): any adapter.
        keep (`float` or `str`): a share of all directions, above 0 and at most 1; or, as `"99%"`, the fewest
            that together carry this share of the information, or of each update.
        information (`dict[str, Tensor]`, *optional*): module -> (E or 1, r), of `gate_information` on the
            same adapter in its singular directions. Where omitted, each module keeps the fewest that hold a share
            of its update's squared norm, in which directions count by the openness of their gates. One share for
            all modules: the one at which the size is right, or `"99%"`. As `sv_fro` of kohya's resize_lora.py.
        max_rank (`int`, *optional*): most directions of a module: the best of the others take their place.
        one_rank (`bool`, *optional*, defaults to False): fill every module up to the largest rank.

    Raises:
        StructLoRAError: a share or a rank out of range, or an adapter that adds nothing.
    """
    refuse_rank(saved, max_rank)
    found = _worth(saved, information)
    _refuse_nothing(found.carried)
    flat = _flat(found.worth)
    allowed = torch.ones_like(flat, dtype=torch.bool)
    if max_rank is not None:
        allowed = torch.cat([_best_of_each(values, max_rank).flatten() for values in found.worth.values()])
    scores = torch.where(allowed, flat, 0)
    asked, is_percentage = share_to_keep(keep)
    of_each = is_percentage and not information
    mask = (scores > 1 - asked if of_each else best(scores, keep)) & allowed
    parts = mask.split([values.numel() for values in found.worth.values()])
    chosen = {m: part.view_as(found.worth[m]) for m, part in zip(found.worth, parts, strict=True)}
    return found.pruned(saved, _at_least_one(saved, chosen, found.worth), one_rank)


def shrink(saved: Saved, rank: int) -> Pruned:
    """Give every module one rank: the largest singular values of its update, which are the update of that rank that is
    nearest to it (Eckart and Young, 1936). Directions count by the openness of their gates.

    Args:
        saved (`Saved`): any adapter.
        rank (`int`): of every module; narrower ones, and those of a smaller rank, are filled with zeros.

    Raises:
        StructLoRAError: a rank above the adapter's, or an adapter that adds nothing.
    """
    refuse_rank(saved, rank)
    found = _worth(saved)
    _refuse_nothing(found.carried)
    kept = {module: _best_of_each(x, rank) for module, x in found.carried.items()}
    return found.pruned(saved, kept, one_rank=True)


class _Worth(NamedTuple):
    """What directions are chosen by.

    `tensors` are of the adapter's file, in the basis of the directions; of module -> (E or 1, r), `worth` orders
    directions over the model and `carried` is summed over those kept; `measure` names it.
    """

    tensors: dict[str, Tensor]
    worth: dict[str, Tensor]
    carried: dict[str, Tensor]
    measure: str

    def pruned(self, saved: Saved, kept: dict[str, Tensor], one_rank: bool) -> Pruned:
        carried = sum(values[kept[module]].sum() for module, values in self.carried.items())
        share = float(carried / sum(values.sum() for values in self.carried.values()))
        return Pruned(saved.lora, self.tensors, kept, one_rank, share, self.measure)


def _worth(saved: Saved, information: dict[str, Tensor] | None = None) -> _Worth:
    if information:
        tensors, _ = with_singular_directions(saved.lora, saved.tensors)
        return _Worth(tensors, information, information, "the information of the rows")
    tensors, sigma = with_singular_directions(saved.lora, saved.tensors, saved.openness)
    energy = {module: values.double().square() for module, values in sigma.items()}
    measure = f"{Pruned.measure}, counted by openness" if saved.openness else Pruned.measure
    return _Worth(tensors, _norm_left(energy), energy, measure)


def _refuse_nothing(worth: dict[str, Tensor]) -> None:
    """Stop where no direction is worth anything, of module -> (E, r)."""
    if not any(values.any() for values in worth.values()):
        raise StructLoRAError(
            "an adapter none of whose directions changes the model, or its loss on the rows",
            "a trained adapter",
            "give a checkpoint of a later step, or other rows",
        )


def refuse_rank(saved: Saved, rank: int | None) -> None:
    """Stop at a rank that an adapter cannot be given, before the work; None is none.

    Raises:
        StructLoRAError: it is out of range.
    """
    largest = max(rank_of(saved.lora, module) for module in factor_names(saved.tensors))
    if rank is not None and not 1 <= rank <= largest:
        expected = f"one from 1 to {largest}"
        raise StructLoRAError(f"a rank of {rank} for an adapter of rank {largest}", expected, "correct it")


def _norm_left(energy: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of module -> (E, r) squared singular values, the largest first: which share of an update's squared norm a direction
    and those after it hold, below 1; of its first one, 1 and its share of all updates.
    """
    total = sum(values.sum() for values in energy.values())
    left = {}
    for module, values in energy.items():
        rest = values.flip(1).cumsum(1).flip(1)
        left[module] = rest / rest[:, :1].clamp(min=torch.finfo(rest.dtype).tiny)
        left[module][:, 0] += values[:, 0] / total
    return left


def _flat(values: dict[str, Tensor]) -> Tensor:
    """(directions,) in fp64, of module -> (E, r)."""
    return torch.cat([of_module.flatten() for of_module in values.values()]).double()


def _best_of_each(worth: Tensor, count: int) -> Tensor:
    """(E, r) of bool: the `count` best directions of each row."""
    places = worth.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(worth, dtype=torch.bool).scatter_(1, places, True)


def _at_least_one(saved: Saved, chosen: dict[str, Tensor], worth: dict[str, Tensor]) -> dict[str, Tensor]:
    """Directions chosen, (E or 1, r) of bool by module; of modules that PEFT cannot leave out, at least the best one."""
    # More than two factors of each module: DoRA's magnitude, a bias.
    more = any(".lora_" in name and not LORA_NAME.match(name) for name in saved.tensors)
    has_more = saved.lora.bias != "none" or more
    for module, mask in chosen.items():
        if not mask.any() and (has_more or shares_pattern(saved.lora, module, chosen)):
            mask[0, worth[module][0].to(torch.float64).argmax()] = True
    return chosen


def size_curve(saved: Saved, count: int = 64) -> tuple[str, list[tuple[float, float]]]:
    """What a smaller adapter keeps that is chosen without rows: the measure, and points (share of the directions, share of
    the measure), evenly spread and with the end; none of an adapter that adds nothing.
    """
    found = _worth(saved)
    carried = _flat(found.carried)
    if not carried.sum() > 0:
        return found.measure, []
    order = _flat(found.worth).argsort(descending=True, stable=True)
    carried = (carried[order].cumsum(0) / carried.sum()).tolist()
    places = torch.linspace(1, len(carried), min(count, len(carried)), dtype=torch.float64, device="cpu")
    return found.measure, [(n / len(carried), carried[n - 1]) for n in places.round().long().tolist()]
