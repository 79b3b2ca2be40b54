"""Hard selection: the directions that serve the task are kept, the others closed for good while the run goes
on (paper, "Information Bottleneck-Driven Low-Rank Direction Filtering").

Relevance of direction j in one step is d_j = ⟨∂L/∂B_j, B_j⟩, the gradient of the loss with respect to the
logarithm of a gate that multiplies it. Its mean square over steps is the Fisher information that the labels
hold about the gate. The gradients that are there anyway give d_j.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config import share_to_keep
from .kinds import Factors

LEAST_STEPS = 10  # of information, before a selection


class Selection(nn.Module):
    """Which directions of one kind are kept. Everything passes until `close` was called.

    Args:
        shape (`tuple[int, int]`): (N, r): N nodes, r directions.
        device (`torch.device`): where the factors live.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device):
        super().__init__()
        self.register_buffer("information", torch.zeros(shape, dtype=torch.float32, device=device))
        self.register_buffer("informed_steps", torch.tensor(0, dtype=torch.int64, device="cpu"))
        self.register_buffer("kept", torch.ones(shape, dtype=torch.bool, device=device))
        self.register_buffer("is_made", torch.tensor(False, dtype=torch.bool, device="cpu"))

    def observe(self, relevance: Tensor) -> None:
        """Take in d of a step, (N, r)."""
        self.information += relevance.square()
        self.informed_steps += 1

    def close(self, kept: Tensor) -> None:
        """Close all directions but those in `kept`, (N, r) of bool."""
        self.kept.copy_(kept)
        self.is_made.fill_(True)

    def forward(self, factors: Factors) -> Factors:
        """Factors with zeros for the columns of lora_B that are closed."""
        return factors._replace(B=factors.B * self.kept[:, None, :]) if self.is_made else factors


Chooser = Callable[[Tensor, "float | str"], Tensor]


def select(selections: list[Selection], keep: float | str, choose: Chooser) -> bool:
    """Keep the best directions over all kinds and close the others. A module may lose all of its own: it is
    the model whose size is asked for, and PEFT leaves such modules out.

    Args:
        selections (`list[Selection]`): of all kinds.
        keep (`float` or `str`): `StructLoRAConfig.keep`.
        choose (`Callable`): (information of all directions (n,), keep) -> which to keep, (n,) of bool.

    Returns:
        Whether a selection was made: False where no direction has any information yet.
    """
    information = torch.cat([selection.information.flatten().cpu() for selection in selections])
    if not bool(information.any()):
        return False
    parts = choose(information, keep).split([selection.kept.numel() for selection in selections])
    for selection, part in zip(selections, parts, strict=True):
        selection.close(part.view_as(selection.kept))
    return True


def best(scores: Tensor, keep: float | str) -> Tensor:
    """Which of all directions to keep, (n,) of bool: those of the highest scores.

    Args:
        scores (`Tensor`): (n,), not negative, not all zero.
        keep (`float` or `str`): as `StructLoRAConfig.keep`.
    """
    share, is_of_information = share_to_keep(keep)
    scores = scores.double()
    order = scores.argsort(descending=True, stable=True)
    count = max(1, round(share * len(scores)))
    if is_of_information:
        carried = scores[order].cumsum(0) / scores.sum()
        count = min(int((carried < share - 1e-12).sum()) + 1, len(scores))
    mask = torch.zeros(len(scores), dtype=torch.bool, device="cpu")
    mask[order[:count]] = True
    return mask
