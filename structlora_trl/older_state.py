"""States that older versions wrote, brought to the present format."""

from __future__ import annotations

from torch import Tensor

from .config import StructLoRAConfig

FORMAT = 4
# Options that came later, and the value that the code had before, where it is not today's default.
_BEFORE_OPTIONS: dict = {}


def upgrade(header: dict, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """A state's header and tensors as the present format has them.

    Raises:
        KeyError, TypeError, ValueError: no run of that format wrote these.
    """
    if header["format"] == 3:
        header, tensors = _from_3(header, tensors)
    options = StructLoRAConfig().options() | _BEFORE_OPTIONS | header["options"]
    return {**header, "options": options}, tensors


def _from_3(header: dict, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Format 3 kept factors as PEFT does, mean gradients of all sides in one, and counts as tensors."""
    new = {name: header[name] for name in ("seed", "kinds")} | {"format": FORMAT, "options": header["config"]}
    new["step"], new["skipped_steps"] = int(tensors["step"]), int(tensors["skipped_steps"])
    new["schedule"] = {
        "largest": float(tensors["schedule.largest"]),
        "warms_up": bool(tensors["schedule.warms_up"]),
    }
    moved = {}
    for name, facts in header["kinds"].items():
        start = f"{name}/"
        own = {key.removeprefix(start): x for key, x in tensors.items() if key.startswith(start)}
        moved |= {f"{start}{key}": x for key, x in _kind_from_3(own, facts).items()}
    return new, moved


def _kind_from_3(own: dict[str, Tensor], facts: dict) -> dict[str, Tensor]:
    _, rows, k, d = facts["shape"]
    stacked = facts["adapted"]["experts"]  # experts in one parameter
    experts, rank = stacked * facts["per_depth"], rows // stacked
    new = {}
    for key, x in own.items():
        if key in ("latent_A", "origin_A") and stacked > 1:
            is_aligned = len(x) == 1  # of one depth for all; then of one expert for all, too
            x = x.unflatten(1, (stacked, -1)).flatten(0, 1)
            x = x[:1] if key == "origin_A" and is_aligned else x
        elif key in ("latent_B", "origin_B") and stacked > 1:
            x = x.unflatten(2, (-1, stacked)).movedim(3, 1).flatten(0, 1)
        elif experts > 1 and ("logits" in key or "initial_gate" in key) and not key.endswith(".step"):
            x = x.transpose(0, 1).flatten(0, 1)  # (E, L, n) -> (L·E, n)
        if key == "graph.semantic":
            x = x if x.dim() == 3 else x[None]
        if key == "graph.features":
            x = x if x.dim() == 3 else x[None]  # (E, L, n)
            nodes = x.transpose(0, 1).flatten(0, 1)
            sizes = {"A": (rank, k), "B": (d, rank)}
            pieces = nodes.split([sizes[side][0] * sizes[side][1] for side in facts["sides"]], dim=-1)
            new |= {
                f"graph.mean_{side}": piece.unflatten(-1, sizes[side]).contiguous()
                for side, piece in zip(facts["sides"], pieces, strict=True)
            }
            continue
        new[key.replace("filter.", "filters.0.", 1).replace("groups.", "filters.1.", 1)] = x.contiguous()
    return new
