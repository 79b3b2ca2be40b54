"""What rows tell of an adapter: its loss, what its directions are worth, and the best size of its update."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import StructLoRAError, refusing
from .base_model import Row, put
from .peft_scaling import LORA_NAME, by_expert, rank_of, scaled

# What an update may be multiplied by. None is above 1: what rows of the training would choose.
SCALES = (1.0, 0.85, 0.7, 0.5, 0.3)


class Losses(NamedTuple):
    """Mean losses of the same rows, those that `rows` names: of the `base` model alone (None where it cannot be had
    from the loaded one), of the adapter `before`, and of the smaller one, `after`; `cut`: before it was taught or scaled.
    """

    base: float | None
    before: float
    after: float
    cut: float | None = None
    rows: str = ""

    @property
    def gain_kept(self) -> float | None:
        """Share of what the adapter had gained over the base model that the smaller one keeps; None where the
        adapter gained nothing, or the base model's loss is unknown.
        """
        gain = None if self.base is None else self.base - self.before
        return (self.base - self.after) / gain if gain and gain > 0 else None


class Scaled(NamedTuple):
    """An update ΔW times a number: `scale`, and the mean losses of the rows that `rows` names at 1, `before`, and at the
    scale, `after`, each row at the one that the other rows choose; None where the scale was given and not chosen.
    """

    scale: float
    rows: str = ""
    before: float | None = None
    after: float | None = None


def run(model: PeftModel, row: Row):
    """A model's output of a row, or of several stacked.

    Raises:
        StructLoRAError: inputs that the model does not take.
    """
    device = next(model.parameters()).device  # accelerate moves it on from there
    with refusing(
        "the model on a row of the data", "its inputs, with `labels`", "correct the data", (RuntimeError,)
    ):
        return model(**{name: value.to(device) for name, value in row.items()})


@torch.no_grad()
def mean_loss(model: PeftModel, rows: list[Row]) -> float | None:
    """Mean loss of rows, one by one; None where the model computes none of the first.

    Raises:
        StructLoRAError: rows that the model does not take, or whose loss is not finite.
    """
    if run(model, rows[0]).get("loss") is None:
        return None
    return sum(float(_loss_of(model, row)) for row in _shown(rows, "loss")) / len(rows)


def _shown(rows: list[Row], what: str) -> Iterable[Row]:
    """The rows, with a progress bar where they take more than two seconds."""
    return tqdm(rows, desc=what, unit="row", leave=False, delay=2)


def _loss_of(model: PeftModel, row: Row) -> Tensor:
    loss = run(model, row).get("loss")
    if loss is None or not loss.isfinite():
        raise StructLoRAError(
            f"a loss of {loss} on a row of the data",
            "rows with labels and a finite loss",
            "correct the data (a label of a text's first token alone counts as none)",
        )
    return loss


def gate_information(model: PeftModel, rows: list[Row]) -> dict[str, Tensor]:
    """What the labels tell about a gate m_j on each direction: its Fisher information I_j = E[(m_j ∂L/∂m_j)²]
    at m_j = 1, the mean over rows of ⟨∂L/∂B_j, B_j⟩².

    It belongs to the directions as they stand in lora_A and lora_B: load an adapter
    `with_singular_directions` for those that `select` chooses from.

    Args:
        model (`PeftModel`): with one adapter; it is left in evaluation mode, its gradients cleared.
        rows (`list[dict[str, Tensor]]`): one example each, with `labels`; some tens are enough to start with.

    Returns:
        Module -> (E or 1, r), in fp32 on the CPU.

    Raises:
        StructLoRAError: rows that the model does not take, without a loss, or with one that is not finite.
    """
    model.eval()
    sides, (lora,) = {}, model.peft_config.values()
    for name, parameter in model.named_parameters():
        match = LORA_NAME.match(name)
        parameter.requires_grad_(bool(match) and match["factor"] == "B")
        if parameter.requires_grad:
            sides[match["module"]] = parameter
    ranks = {module: rank_of(lora, module) for module in sides}
    experts = {module: B.shape[1] // ranks[module] for module, B in sides.items()}
    found = {
        module: torch.zeros(experts[module], ranks[module], dtype=torch.float32, device="cpu")
        for module in sides
    }
    for row in _shown(rows, "information"):
        loss = _loss_of(model, row)
        gradients = torch.autograd.grad(loss, [*sides.values()], allow_unused=True)
        for (module, B), gradient in zip(sides.items(), gradients, strict=True):
            # An expert that is a module of its own, and that no token of this row reaches.
            if gradient is None:
                continue
            parts = by_expert((gradient * B.detach()).float().flatten(1), experts[module]).sum(1)  # (E, r)
            found[module] += parts.square().cpu() / len(rows)
    return found


@torch.no_grad()
def choose_scale(model: PeftModel, tensors: dict[str, Tensor], rows: list[Row], name: str) -> Scaled:
    """The one of `SCALES` at which the mean loss of rows is lowest; 1 where it is no help to a row that did not choose.

    Each row is held against the scale that all others choose (leave-one-out), so that the loss after it is of rows
    that had no part in the choice, and a choice that is chance is not taken.

    Args:
        model (`PeftModel`): with one adapter, in evaluation mode; it is left at the last scale.
        tensors (`dict[str, Tensor]`): of an adapter's file, of the shapes that the model has.
        rows (`list[dict[str, Tensor]]`): one example each, with labels, that the adapter was not trained on.
        name (`str`): of the rows.

    Raises:
        StructLoRAError: rows that the model does not take, without a loss, or with one that is not finite.
    """
    found = []
    for scale in SCALES:
        put(model, scaled(tensors, scale))
        found.append([float(_loss_of(model, row)) for row in rows])
    losses = torch.tensor(found, dtype=torch.float64, device="cpu")  # (scales, n)
    of_others = (losses.sum(1, keepdim=True) - losses).argmin(0)  # (n,)
    before, after = float(losses[0].mean()), float(losses.gather(0, of_others[None]).mean())
    if after >= before:
        return Scaled(1.0, name, before, before)
    return Scaled(SCALES[int(losses.sum(1).argmin())], name, before, after)
