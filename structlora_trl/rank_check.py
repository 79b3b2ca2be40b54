"""Whether all ranks train the same thing: one small all-reduce at attach, and on a mismatch an error on every
rank.
"""

from __future__ import annotations

import hashlib
import json

import torch
import torch.distributed as dist

from .errors import StructLoRAError


def is_distributed() -> bool:
    """Whether this process belongs to a process group, if only to one of its own."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes in this run, 1 where nothing is distributed."""
    return dist.get_world_size() if is_distributed() else 1


def is_first_rank() -> bool:
    """Whether this process speaks for all."""
    return not is_distributed() or dist.get_rank() == 0


def refuse_disagreement(facts: dict, device: torch.device) -> None:
    """Stop all ranks where their facts differ.

    Args:
        facts (`dict`): what must be equal on all ranks, of types that JSON has; mappings are compared by entry.
        device (`torch.device`): where the run's collectives work.

    Raises:
        StructLoRAError: on every rank; the message says which facts differ, and how.
    """
    # Of facts that are themselves mappings, such as the options, the entry alone is named that differs.
    facts = {
        f"{name}: {key}" if isinstance(value, dict) else name: entry
        for name, value in facts.items()
        for key, entry in (value if isinstance(value, dict) else {name: value}).items()
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()
    number = int.from_bytes(digest[:7], "big")  # 56 bits, and its sign to spare
    extremes = torch.tensor([number, -number], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    if int(extremes[0]) == -int(extremes[1]):
        return
    everyone: list = [None] * world_size()
    dist.all_gather_object(everyone, facts)
    names = dict.fromkeys(name for other in everyone for name in other)
    differing = [
        name for name in names if any(other.get(name) != everyone[0].get(name) for other in everyone)
    ]
    found = "; ".join(
        f"{name}: {', '.join(f'rank {r} has {f.get(name)!r}' for r, f in enumerate(everyone))}"
        for name in differing
    )
    raise StructLoRAError(
        f"ranks that differ in {', '.join(differing)} ({found})",
        "the same adapter, configuration, seed and library versions on every rank",
        "give every process the same script and arguments",
    )
