"""Engines: who owns the parameters during an optimizer step, behind one small interface."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..core.kinds import Kind
from ..errors import StructLoRAError
from ..rank_check import world_size
from .base import Engine
from .fsdp2 import FSDP2Engine
from .replicated import ReplicatedEngine
from .torch import TorchEngine

__all__ = ["Engine", "TorchEngine", "select_engine"]


def select_engine(model: nn.Module, optimizer: torch.optim.Optimizer, kinds: list[Kind]) -> Engine:
    """The engine that is in use, detected from the live objects and never from a configuration.

    Args:
        model (`nn.Module`): as the trainer wrapped it: DDP's wrapper, DeepSpeed's engine, or the model
            itself.
        optimizer (`torch.optim.Optimizer`): the real optimizer.
        kinds (`list[Kind]`): what is trained.

    Raises:
        StructLoRAError: the parameters are owned by something that no engine serves.
    """
    if type(model).__module__.startswith("deepspeed"):
        from .deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, kinds)
    _refuse_divided_experts(model, kinds)
    if any(isinstance(m, FSDPModule) for m in model.modules()):
        if not any(isinstance(p, DTensor) for kind in kinds for p in kind.parameters):
            return ReplicatedEngine(model, optimizer, kinds)
        return FSDP2Engine(model, optimizer, kinds)
    found, remedy = None, "launch with one of these, and pass the wrapped model"
    if any(isinstance(p, DTensor) for p in model.parameters()):
        found = "parameters sharded by tensor parallelism (`tp_size`)"
        remedy = "load the model with `tp_size=1`, and shard it with FSDP2 or DeepSpeed ZeRO-3"
    elif any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        found = "parameters sharded by FSDP1"
        remedy = "set `fsdp_version: 2` in the `fsdp_config` of accelerate's file, or `version: 2` in Trainer's `fsdp_config`"
    elif any(isinstance(m, DataParallel) and len(m.device_ids) > 1 for m in model.modules()):
        found = "a model in `nn.DataParallel`, whose forward runs on copies that no hook reaches"
        remedy = "launch with `torchrun` or `accelerate launch`, or show one GPU (`CUDA_VISIBLE_DEVICES=0`)"
    elif any(hasattr(p, "ds_id") for p in model.parameters()) or type(optimizer).__module__.startswith(
        "deepspeed"
    ):
        found = "parameters of a DeepSpeed engine, without the engine"
    elif world_size() > 1 and not any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        found = f"{world_size()} processes and a model that is not wrapped for them"
    if found:
        raise StructLoRAError(
            found,
            "one process, DDP, FSDP2 (`fully_shard`) or DeepSpeed ZeRO 1 to 3 (`deepspeed.initialize`)",
            remedy,
        )
    return TorchEngine(optimizer, kinds, "torch" if world_size() == 1 else "DDP")


def _refuse_divided_experts(model: nn.Module, kinds: list[Kind]) -> None:
    """Stop where each rank holds other experts than the adapter has (expert parallelism of Transformers)."""
    stacks = [kind.name for kind in kinds if kind.adapted.experts > 1]
    meshes = (p.device_mesh.mesh_dim_names or () for p in model.parameters() if isinstance(p, DTensor))
    if stacks and any("ep" in names for names in meshes):
        raise StructLoRAError(
            f"expert parallelism, with LoRA on the experts that it divides over ranks ({', '.join(stacks)})",
            "LoRA on modules of which every rank has all, which PEFT's forward needs too",
            "leave the experts out of `target_parameters`, or load the model with `ep_size=1`",
        )
