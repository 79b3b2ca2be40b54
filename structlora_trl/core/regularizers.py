"""Static regularisers that the paper compares with, on updates of neighbouring depths, and their cosine.

Each takes node features, (..., L, n), and returns a scalar. Where features are slices of the width,
`sum_over_width` sums a tensor over all slices; the gradient is then that of the whole penalty with respect to
this slice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_SMALLEST_NORM = 1e-8  # as in `torch.nn.functional.cosine_similarity`


def cosine(features: Tensor, sum_over_width: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """LoRA+Cos: Σ_l 1 − cos(u_l, u_l+1)."""
    products = neighbour_products(features)
    # The values of all slices, the gradient of this one.
    products = products + (sum_over_width(products.detach()) - products.detach())
    return (1 - cosines(products)).sum()


def laplacian(features: Tensor, sum_over_width: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """LoRA+Laplacian: Σ_l ‖u_l+1 − u_l‖². Of a slice, its own share: shares add up."""
    return (features[..., 1:, :] - features[..., :-1, :]).square().sum()


def neighbour_products(features: Tensor) -> Tensor:
    """Products of each depth with the next, and of both with themselves: (..., L, n) -> (3, ..., L − 1).

    Products of slices add up to those of the whole.
    """
    later, earlier = features[..., 1:, :], features[..., :-1, :]
    squares = torch.linalg.vecdot(features, features)
    return torch.stack([torch.linalg.vecdot(later, earlier), squares[..., 1:], squares[..., :-1]])


def cosines(products: Tensor) -> Tensor:
    """Cosines of neighbours, from `neighbour_products`: (3, ..., L − 1) -> (..., L − 1)."""
    product, *squares = products
    later, earlier = (square.clamp(min=_SMALLEST_NORM**2).sqrt() for square in squares)
    return product / (later * earlier)


REGULARIZERS = {"cosine": cosine, "laplacian": laplacian}
