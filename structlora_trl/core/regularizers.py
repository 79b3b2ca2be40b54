"""The static regularisers that the paper compares with, on the updates of neighbouring depths.

Each is a function of node features, (..., L, n) -> scalar.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity


def cosine(features: Tensor) -> Tensor:
    """LoRA+Cos: Σ_l 1 − cos(u_l, u_l+1)."""
    return (1 - cosine_similarity(features[..., 1:, :], features[..., :-1, :], dim=-1)).sum()


def laplacian(features: Tensor) -> Tensor:
    """LoRA+Laplacian: Σ_l ‖u_l+1 − u_l‖²."""
    return (features[..., 1:, :] - features[..., :-1, :]).square().sum()


REGULARIZERS = {"cosine": cosine, "laplacian": laplacian}
