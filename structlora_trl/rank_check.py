"""Whether all ranks train the same thing: one small all-gather at attach, and on a mismatch an error on each."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .errors import StructLoRAError


def is_distributed() -> bool:
    """Whether this process belongs to a process group, if only to one of its own."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes in this run, 1 where nothing is distributed."""
    return dist.get_world_size() if is_distributed() else 1


def refuse_disagreement(facts: dict, device: torch.device) -> None:
    """Stop all ranks where their facts differ. A collective.

    Args:
        facts (`dict`): what must be equal on all ranks, in what `repr` shows of it.
        device (`torch.device`): where the run's collectives work.

    Raises:
        StructLoRAError: on every rank; the message says which facts differ, and how.
    """
    everyone: list = [None] * world_size()
    # NCCL sends objects by way of the current device, which a loop of the user's own may have left at the first.
    with torch.accelerator.device_index(device.index):
        dist.all_gather_object(everyone, facts)
    # By `repr`, in which NaN, of weights that have diverged, is equal to NaN.
    differing = [name for name in facts if len({repr(other.get(name)) for other in everyone}) > 1]
    if not differing:
        return
    found = "; ".join(
        f"{name}: {', '.join(f'rank {r} has {f.get(name)!r}' for r, f in enumerate(everyone))}"
        for name in differing
    )
    raise StructLoRAError(
        f"ranks that differ in {', '.join(differing)} ({found})",
        "the same adapter, configuration, seed and library versions on every rank",
        "give every process the same script and arguments",
    )
