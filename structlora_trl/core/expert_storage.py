"""How PEFT stores the factors of a kind, and the nodes that the map sees.

Of most kinds they are the same. Experts that a mixture keeps in one parameter share one LoRA module: its
lora_A is (E·r, k) with rows in the order (expert, r), its lora_B (d, r·E) with columns in the order (r,
expert). Experts that are modules of their own are nodes as they are, in the order (depth, expert). A slice of
the width (of k or d) is converted alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kinds import Kind, matrix_shape


def stack_nodes(factors: list[Tensor], side: str, kind: Kind) -> Tensor:
    """Stack the factors of a kind's modules on one side, as PEFT stores them, into those of its nodes.

    Args:
        factors (`list[Tensor]`): of any shape that PEFT gives them. Empty where the kind has none on that
            side (VeRA has no lora_A).
        side (`str`): 'A' or 'B'.

    Returns:
        `Tensor` of shape (N, r, k) or (N, d, r).
    """
    if not factors:
        return empty_nodes(side, kind)
    return to_nodes(torch.stack([factor.reshape(matrix_shape(factor)) for factor in factors]), side, kind)


def empty_nodes(side: str, kind: Kind) -> Tensor:
    """Stacked factors of no width, for a side that is left out: (N, r, 0) or (N, 0, r), fp32."""
    shape = (kind.node_count, kind.rank, 0) if side == "A" else (kind.node_count, 0, kind.rank)
    return torch.empty(shape, dtype=torch.float32, device=kind.device)


def to_nodes(stored: Tensor, side: str, kind: Kind) -> Tensor:
    """Stacked factors of the modules as PEFT stores them -> those of the nodes.

    Args:
        stored (`Tensor`): of modules, (M, rows of lora_A, k) or (M, d, columns of lora_B).
        side (`str`): 'A' or 'B'.

    Returns:
        `Tensor` of shape (N, r, k) or (N, d, r).
    """
    experts = kind.adapted.experts
    if experts == 1:
        return stored
    if side == "A":
        return stored.unflatten(1, (experts, -1)).flatten(0, 1)
    return stored.unflatten(2, (-1, experts)).movedim(3, 1).flatten(0, 1)


def to_storage(nodes: Tensor, side: str, kind: Kind) -> Tensor:
    """The inverse of `to_nodes`."""
    experts = kind.adapted.experts
    if experts == 1:
        return nodes
    by_module = nodes.unflatten(0, (-1, experts))  # (M, E, r, k) or (M, E, d, r)
    return by_module.flatten(1, 2) if side == "A" else by_module.movedim(1, 3).flatten(2)
