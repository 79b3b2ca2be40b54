"""Dropping directions of a finished adapter: a smaller plain LoRA adapter.

Removing row j of a module's lora_A and column j of its lora_B takes exactly that rank-one part out of its
update. Which go:

* `shrink`: of any adapter, all but the R largest singular values of each module's update, so that all modules
  have one rank, which is what LoRA servers pay for.
* `select`: of any adapter, those that matter least over the whole model, to a task or to the updates, among the
  singular directions of each module's update: directions depend on the basis, and the update does not. Ranks differ.
* `prune`: those that add nothing, as `keep` leaves them.
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
from .peft_scaling import (
    LORA_NAME,
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
        kept (`dict[str, list[list[int]]]`): module -> directions kept, of each of its experts or of itself.
        one_rank (`bool`): whether every module is filled up to the largest rank.
        spared (`list[str]`): modules none of whose directions would stay, and that keep their best one, since
            PEFT cannot leave them out (experts in one parameter, torch's attention, DoRA, biases).
        share (`float`, *optional*): what the directions kept carry of `measure`.
        measure (`str`): what they were chosen by.
    """

    whole: LoraConfig
    directions: dict[str, Tensor]
    kept: dict[str, list[list[int]]]
    one_rank: bool = False
    spared: list[str] = field(default_factory=list)
    share: float | None = None
    measure: str = "the updates' squared norm"

    def __post_init__(self):
        self.lora, self.tensors = self.written(self.directions)

    def written(self, directions: dict[str, Tensor]) -> tuple[LoraConfig, dict[str, Tensor]]:
        """Configuration and file of the smaller adapter, with factors from `directions`, of the shapes of the
        whole one.

        Raises:
            StructLoRAError: PEFT needs the ranks as they are (PiSSA, OLoRA, LoftQ).
        """
        return with_one_scale(self.whole, directions, self.kept, self.one_rank)

    @property
    def empty(self) -> list[str]:
        """Modules without any direction."""
        return [module for module, experts in self.kept.items() if not any(experts)]

    @property
    def left_out(self) -> list[str]:
        """Modules that the new adapter does not adapt: the empty ones, but where all are filled up to one rank."""
        return [] if self.one_rank else self.empty

    def masked(self) -> dict[str, Tensor]:
        """`directions` with zeros in place of those that are not kept: the same adapter, at its old size."""
        return masked(self.whole, self.directions, self.kept)

    @property
    def count(self) -> int:
        """Directions kept."""
        return sum(len(expert) for experts in self.kept.values() for expert in experts)


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
    for index in range(len(saved.kinds)):
        factors = saved.factors(index)  # A (L, r, k), B (L, d, r), with experts before them
        opened = saved.by_module(index, (factors.B != 0).any(-2) & (factors.A != 0).any(-1))
        # Without what fills smaller ranks of a kind up with zeros.
        adds |= {module: mask[:, : rank_of(saved.lora, module)] for module, mask in opened.items()}
    _refuse_nothing(adds)
    if all(bool(of_module.all()) for of_module in adds.values()):
        return None
    kept, spared = _kept(saved, adds, {name: x.float() for name, x in adds.items()})
    return Pruned(saved.lora, saved.tensors, kept, one_rank, spared)


def select(
    saved: Saved,
    keep: float | str,
    information: dict[str, Tensor] | None = None,
    max_rank: int | None = None,
    one_rank: bool = False,
) -> Pruned:
    """Keep the singular directions that matter most, over the whole model: ranks differ by module.

    Args:
        saved (`Saved`): any adapter.
        keep (`float` or `str`): a share of all directions, above 0 and at most 1; or, as `"99%"`, the fewest
            that together carry this share of the information.
        information (`dict[str, Tensor]`, *optional*): module -> (E or 1, r), of `gate_information` on the
            same adapter in its singular directions. Where omitted, each module keeps the fewest that hold a share
            of its update's squared norm, one share for all modules: the one at which the size is right, or `"99%"`.
            As `sv_fro` of kohya's resize_lora.py; the largest over the whole model were worse
            (`benchmarks/quality/smaller.md`).
        max_rank (`int`, *optional*): most directions of a module: the best of the others take their place.
        one_rank (`bool`, *optional*, defaults to False): fill every module up to the largest rank.

    Raises:
        StructLoRAError: a share or a rank out of range, an adapter that adds nothing, or one whose ranks PEFT
            needs as they are (PiSSA, OLoRA, LoftQ).
    """
    refuse_rank(saved, max_rank)
    tensors, sigma = with_singular_directions(saved.lora, saved.tensors)
    _refuse_nothing(information or sigma, "the loss on these rows" if information else "the model")
    worth = {module: information[module] for module in sigma} if information else _norm_left(sigma)
    flat = _flat(worth)
    allowed = torch.ones_like(flat, dtype=torch.bool)
    if max_rank is not None:
        allowed = torch.cat([_best_of_each(values, max_rank).flatten() for values in worth.values()])
    scores = torch.where(allowed, flat, 0)
    asked, is_percentage = share_to_keep(keep)
    of_each = is_percentage and not information
    mask = (scores > 1 - asked if of_each else best(scores, keep)) & allowed
    parts = mask.split([values.numel() for values in worth.values()])
    chosen = {module: part.view_as(worth[module]) for module, part in zip(worth, parts, strict=True)}
    kept, spared = _kept(saved, chosen, worth)
    carried = flat if information else _flat(sigma).square()
    share = float(carried[mask].sum() / carried.sum())
    measure = "the information of the rows" if information else Pruned.measure
    return Pruned(saved.lora, tensors, kept, one_rank, spared, share, measure)


def shrink(saved: Saved, rank: int) -> Pruned:
    """Give every module one rank, with the largest singular values of its update: the update of that rank which is
    nearest to it (Eckart and Young, 1936).

    To choose by what a module adds to its output on some rows was no better (`benchmarks/quality/smaller.md`).

    Args:
        saved (`Saved`): any adapter.
        rank (`int`): of every module; narrower ones, and those of a smaller rank, are filled with zeros.

    Raises:
        StructLoRAError: a rank above the adapter's, an adapter that adds nothing, or one whose ranks PEFT
            needs as they are (PiSSA, OLoRA, LoftQ).
    """
    refuse_rank(saved, rank)
    tensors, sigma = with_singular_directions(saved.lora, saved.tensors)
    _refuse_nothing(sigma)
    kept, shares = {}, []
    for module, values in sigma.items():
        first = list(range(min(rank, values.shape[1])))
        kept[module] = [first] * len(values)
        energy = values.square()
        if energy.any():
            shares.append(float(energy[:, first].sum() / energy.sum()))
    share, measure = sum(shares) / len(shares), f"{Pruned.measure}, mean over modules"
    return Pruned(saved.lora, tensors, kept, one_rank=True, share=share, measure=measure)


def _refuse_nothing(worth: dict[str, Tensor], what: str = "the model") -> None:
    """Stop where no direction is worth anything, of module -> (E, r)."""
    if not any(values.any() for values in worth.values()):
        raise StructLoRAError(
            f"an adapter none of whose directions changes {what}",
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
        raise StructLoRAError(
            f"a rank of {rank} for an adapter of rank {largest}",
            f"a smaller one, from 1 to {largest}",
            f"try {max(1, largest // 2)}",
        )


def _norm_left(sigma: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of module -> (E, r) singular values, the largest first: which share of an update's squared norm a direction and
    those after it hold, below 1; of its first one, 1 and its share of all updates.
    """
    energy = {module: values.double().square() for module, values in sigma.items()}
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


def _kept(
    saved: Saved, chosen: dict[str, Tensor], worth: dict[str, Tensor]
) -> tuple[dict[str, list[list[int]]], list[str]]:
    """Directions chosen, (E or 1, r) of bool by module, as lists; and modules that keep their best one all the same."""
    # More than two factors of each module: DoRA's magnitude, a bias.
    more = any(".lora_" in name and not LORA_NAME.match(name) for name in saved.tensors)
    has_more = saved.lora.bias != "none" or more
    kept, spared = {}, []
    for module, mask in chosen.items():
        kept[module] = [row.nonzero().flatten().tolist() for row in mask]
        if not any(kept[module]) and (has_more or shares_pattern(saved.lora, module, chosen)):
            kept[module][0] = [int(worth[module][0].argmax())]
            spared.append(module)
    return kept, spared


def size_curve(saved: Saved, count: int = 64) -> list[tuple[float, float]]:
    """What a smaller adapter keeps that is chosen without rows: points (share of the directions, share of the
    squared norm of the update), evenly spread and with the end; none of an adapter that adds nothing.
    """
    _, sigma = with_singular_directions(saved.lora, saved.tensors)
    energy = _flat(sigma).square()
    if not energy.sum() > 0:
        return []
    order = _flat(_norm_left(sigma)).argsort(descending=True, stable=True)
    carried = (energy[order].cumsum(0) / energy.sum()).tolist()
    places = torch.linspace(1, len(carried), min(count, len(carried)), dtype=torch.float64, device="cpu")
    return [(place / len(carried), carried[place - 1]) for place in places.round().long().tolist()]
