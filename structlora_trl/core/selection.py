"""Hard selection: the directions whose gates are most open are kept, the others closed for good while the run goes
on (paper, "Information Bottleneck-Driven Low-Rank Direction Filtering").
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config import share_to_keep


class Selection(nn.Module):
    """Which directions of one kind are kept. Everything passes until `close` was called.

    Args:
        shape (`tuple[int, int]`): (N, r): N nodes, r directions.
        device (`torch.device`): where the factors live.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device):
        super().__init__()
        self.register_buffer("kept", torch.ones(shape, dtype=torch.bool, device=device))
        self.register_buffer("is_made", torch.tensor(False, dtype=torch.bool, device="cpu"))

    def close(self, kept: Tensor) -> None:
        """Close all directions but those in `kept`, (N, r) of bool."""
        self.kept.copy_(kept)
        self.is_made.fill_(True)

    def forward(self, B: Tensor) -> Tensor:
        """Return lora_B, (N, d, r), with zeros for the columns that are closed."""
        return B * self.kept[:, None, :] if self.is_made else B


Chooser = Callable[[Tensor, "float | str"], Tensor]


def best(scores: Tensor, keep: float | str) -> Tensor:
    """Return which of all directions to keep, (n,) of bool: those of the highest scores.

    Args:
        scores (`Tensor`): (n,), not negative, not all zero.
        keep (`float` or `str`): a share of the directions, or as `"99%"` the fewest that carry this share of
            the scores' sum.
    """
    share, is_of_sum = share_to_keep(keep)
    scores = scores.double()
    order = scores.argsort(descending=True, stable=True)
    count = max(1, round(share * len(scores)))
    if is_of_sum:
        carried = scores[order].cumsum(0) / scores.sum()
        count = min(int((carried < share - 1e-12).sum()) + 1, len(scores))
    mask = torch.zeros(len(scores), dtype=torch.bool, device="cpu")
    mask[order[:count]] = True
    return mask
