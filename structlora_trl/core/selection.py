"""Hard selection: the directions that serve the task are kept, the others closed for good while the run goes
on (paper, "Information Bottleneck-Driven Low-Rank Direction Filtering").

Relevance of direction j in one step is d_j = ⟨∂L/∂B_j, B_j⟩, the gradient of the loss with respect to the
logarithm of the gate that multiplies it. Its mean square over steps is the Fisher information that the labels
hold about the gate. The pullback gives d_j for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import StructLoRAConfig, share_to_keep
from .kinds import Factors


class Selection(nn.Module):
    """Which directions of one kind are kept. Everything passes until `close` was called.

    Closed directions are exact zeros of effective lora_B, whatever messages arrive, and they send none.

    Args:
        shape (`tuple[int, int]`): (N, r): N nodes, r directions.
        device (`torch.device`): where the factors live.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device):
        super().__init__()
        self.register_buffer("information", torch.zeros(shape, dtype=torch.float32, device=device))
        self.register_buffer("kept", torch.ones(shape, dtype=torch.bool, device=device))
        self.register_buffer("is_made", torch.tensor(False, dtype=torch.bool, device="cpu"))

    def observe(self, relevance: Tensor) -> None:
        """Take in d of a step, (N, r)."""
        self.information += relevance.square()

    def close(self, kept: Tensor) -> None:
        """Close all directions but those in `kept`, (N, r) of bool."""
        self.kept.copy_(kept)
        self.is_made.fill_(True)

    def messages(self, features: Tensor) -> Tensor:
        """Node features (N, r, n), with zeros for closed directions."""
        return features * self.kept[..., None] if self.is_made else features

    def forward(self, effective: Factors) -> Factors:
        """Effective factors, A (N, r, k), B (N, d, r), with zeros for closed directions in B."""
        return effective._replace(B=effective.B * self.kept[:, None, :]) if self.is_made else effective


def select(selections: list[Selection], config: StructLoRAConfig, seed: int) -> bool:
    """Keep the best directions over all kinds and close the others. A module may lose all of its own: it is
    the model whose size is asked for, and PEFT leaves such modules out.

    Args:
        selections (`list[Selection]`): of all kinds.
        config (`StructLoRAConfig`): `keep`, and `select_by`.
        seed (`int`): of the draw where `select_by` is 'random'.

    Returns:
        Whether a selection was made: False where no direction has any information yet.
    """
    scores = torch.cat([selection.information.flatten().cpu() for selection in selections])
    if config.select_by == "random":
        generator = torch.Generator("cpu").manual_seed(seed)
        scores = torch.rand(len(scores), generator=generator, dtype=torch.float32, device="cpu")
    if not bool(scores.any()):
        return False
    parts = best(scores, config.keep).split([selection.kept.numel() for selection in selections])
    for selection, part in zip(selections, parts, strict=True):
        selection.close(part.view_as(selection.kept))
    return True


def best(scores: Tensor, keep: float | str) -> Tensor:
    """Which of all directions to keep, (n,) of bool.

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
