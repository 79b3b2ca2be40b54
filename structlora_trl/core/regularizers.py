"""The static regularisers that the paper compares with, on the updates of neighbouring depths, and the cosine they share.

Each is a function of node features, (..., L, n) -> scalar. Where ranks share the width, each has a slice of n, and what they
return sums to the whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .width import WHOLE, Width

_SMALLEST_NORM = 1e-8  # as in `torch.nn.functional.cosine_similarity`


def cosine(features: Tensor, width: Width = WHOLE) -> Tensor:
    """LoRA+Cos: Σ_l 1 − cos(u_l, u_l+1)."""
    return (1 - cosines(width.sum(neighbour_products(features)))).sum() / width.count


def laplacian(features: Tensor, width: Width = WHOLE) -> Tensor:
    """LoRA+Laplacian: Σ_l ‖u_l+1 − u_l‖²."""
    return (features[..., 1:, :] - features[..., :-1, :]).square().sum()


def neighbour_products(features: Tensor) -> Tensor:
    """What the cosines of neighbours are made of, and what sums over the width: (..., L, n) -> (3, ..., L − 1), the product of
    each with its neighbour, and of both with themselves."""
    later, earlier = features[..., 1:, :], features[..., :-1, :]
    squares = torch.linalg.vecdot(features, features)
    return torch.stack([torch.linalg.vecdot(later, earlier), squares[..., 1:], squares[..., :-1]])


def cosines(products: Tensor) -> Tensor:
    """Cosines of neighbours, (3, ..., L − 1) -> (..., L − 1)."""
    product, *squares = products
    later, earlier = (square.clamp(min=_SMALLEST_NORM**2).sqrt() for square in squares)
    return product / (later * earlier)


REGULARIZERS = {"cosine": cosine, "laplacian": laplacian}
