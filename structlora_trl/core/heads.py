"""Attention heads: on which side of a module they lie, and how wide one is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .kinds import Heads, Kind, matches

# By the end of a module's name (patterns as in `RESIDUAL_ROLES`): heads are rows of lora_B where a module's
# outputs go to them, columns of lora_A where its inputs come from them. Fused projections hold blocks of a
# head's width, too.
_SIDES = {
    r"[qkv]_proj|qkv_proj|query|key|value|query_proj|key_proj|value_proj|[qkv]_lin|[qkv]|to_[qkv]|add_[qkv]_proj": "B",
    r"query_key_value|Wqkv|c_attn|q_attn|(self_)?attn\.qkv|linear_[qkv]|self\.in_proj": "B",
    r"o_proj|out_proj|attention\.output\.dense|(self_)?attention\.dense|out_lin|o|to_out(\.0)?|to_add_out": "A",
    r"attn\.proj|attn\.Wo|self_attn\.dense|attention\.projection_layer|self_attn\.projection": "A",
}
# What attention modules call the width of a head.
_NAMES = ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_per_head")


def heads_of(model: nn.Module, kind: Kind) -> Heads | None:
    """The heads of a kind; None where it is no attention projection, or nothing tells a head's width."""
    side = heads_side(kind)
    if side is None or kind.is_vera:  # VeRA's λ_d has neither rows nor columns of heads
        return None
    _, _, columns, rows = kind.shape
    width = columns if side == "A" else rows
    size = next(_sizes(model, kind.modules[0]), 0)
    return Heads(side, width // size) if size and width % size == 0 else None


def heads_side(kind: Kind) -> str | None:
    """The side on which a kind's heads lie, 'A' or 'B'; None where it is no attention projection."""
    if kind.is_expert:
        return None
    return next((side for pattern, side in _SIDES.items() if matches(pattern, kind)), None)


def head_numbers(kind: Kind) -> Tensor:
    """The head of each row of stacked lora_B, (1, d, 1), or of each column of stacked lora_A, (1, 1, k)."""
    _, _, columns, rows = kind.shape
    width = columns if kind.heads.side == "A" else rows
    numbers = torch.arange(width, dtype=torch.int64, device=kind.device) // (width // kind.heads.count)
    return numbers[None, None, :] if kind.heads.side == "A" else numbers[None, :, None]


def _sizes(model: nn.Module, module: str) -> Iterator[int]:
    """Head widths that a module's parent, or a module beside that (BERT's `attention.self`), tells of."""
    path = module.split(".")
    for depth in (1, 2):
        holder = model.get_submodule(".".join(path[:-depth]))
        for candidate in (holder, *holder.children()):
            found = (getattr(candidate, name, None) for name in _NAMES)
            yield from (size for size in found if type(size) is int and size > 0)
