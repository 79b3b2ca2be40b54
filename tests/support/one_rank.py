"""What StructLoRA does under DeepSpeed, FSDP and the like in one process; prints it as JSON.

A script, since process groups and DeepSpeed keep global state. One process is enough: an engine is detected from its objects.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from types import SimpleNamespace

import peft.optimizers
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_module
from torch.nn.parallel import DataParallel

from structlora_trl import StructLoRAError, attach
from tests.support.device import without_shm_op
from tests.support.setups import lorafa, riemannian
from tests.support.tiny import DATA, adamw, lora_parameters, loss_of, peft_model


def deepspeed_engine(stage: int, optimizer=adamw, model=None, scheduler=None, dtype=None, **zero):
    import deepspeed

    without_shm_op()
    model = peft_model() if model is None else model
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    config |= {"zero_optimization": {"stage": stage, **zero}}
    if dtype:
        config |= {dtype: {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    given = optimizer(model)
    if scheduler:  # which DeepSpeed gives to its own optimizers alone
        parameters = {"lr": PEAKS["lora_B"], "torch_adam": True}
        config |= {"scheduler": scheduler, "optimizer": {"type": "AdamW", "params": parameters}}
        given = {"model_parameters": given.param_groups}
    else:
        given = {"optimizer": given}
    return deepspeed.initialize(model=model, config=config, **given)[0]


# --- engines that are not served ------------------------------------------------------------------------------------


def part_of_the_model():
    model = peft_model()
    fully_shard(model.base_model.model.model.layers[0])
    return model


def pipeline():
    from deepspeed import PipelineEngine

    engine = deepspeed_engine(1)
    engine.__class__ = PipelineEngine
    return engine


def other_optimizer(name: str):
    engine = deepspeed_engine(3)
    engine.optimizer.__class__ = type(name, (type(engine.optimizer),), {})
    return engine


def with_optimizer(**attributes):
    # What an NVMe drive or a GPU would bring about.
    engine = deepspeed_engine(2)
    for name, value in attributes.items():
        setattr(engine.optimizer, name, value)
    return engine


def muon():
    engine = deepspeed_engine(2)
    next(engine.module.parameters()).use_muon = True
    return engine


def by_layers(model):
    """A parameter group of each layer, as layer-wise learning rates have."""
    groups = {}
    for name, parameter in lora_parameters(model).items():
        groups.setdefault(name.split("layers.")[1][0], []).append(parameter)
    return torch.optim.AdamW([{"params": group} for group in groups.values()], lr=1e-3)


def data_parallel():
    model = DataParallel(peft_model())
    model.device_ids = [0, 1]  # as of two GPUs
    return model


# case -> model, and names that the message holds
UNSERVED = {
    "FSDP2 of a part": (part_of_the_model, "placements none"),
    "tensor parallelism": (
        lambda: distribute_module(peft_model(), init_device_mesh("cpu", (1,))),
        "tensor parallelism.*FSDP2 or DeepSpeed ZeRO-3",
    ),
    "FSDP1": (
        lambda: FullyShardedDataParallel(peft_model(), use_orig_params=True, device_id=torch.device("cpu")),
        "FSDP1.*`fsdp_version: 2` in the `fsdp_config`",
    ),
    "ZeRO stage 0": (lambda: deepspeed_engine(0), "ZeRO stage 0.*1, 2 or 3"),
    "pipeline": (pipeline, "pipeline parallelism.*ZeRO stage 1, 2 or 3"),
    "ZeRO++": (lambda: deepspeed_engine(2, zero_quantized_gradients=True), r"ZeRO\+\+.*`zero_quantized_"),
    "MiCS": (lambda: other_optimizer("MiCS_Optimizer"), "MiCS_Optimizer.*standard optimizer"),
    "another optimizer of DeepSpeed's": (
        lambda: other_optimizer("SuperOffloadOptimizer_Stage3"),
        "SuperOffloadOptimizer_Stage3.*ZeRO stage 1, 2 or 3",
    ),
    "NVMe": (lambda: with_optimizer(swap_optimizer=True), "NVMe.*`device: cpu`"),
    "Muon": (muon, "Muon"),
    "torch_autocast": (
        lambda: with_optimizer(torch_autocast_gradscaler=SimpleNamespace()),
        "`torch_autocast`.*`bf16` or `fp16`",
    ),
    "LoRA-FA's optimizer": (lambda: deepspeed_engine(2, lorafa), "LoraFAOptimizer.*DDP"),
    "a kind in several groups": (
        lambda: deepspeed_engine(2, by_layers),
        "lora_B of .* in 3 groups.*`sub_group_size`",
    ),
    "partial offload": (
        lambda: with_optimizer(backup_optimizer=object(), partial_offload=0.5),
        "`offload_optimizer.ratio` below 1",
    ),
    "DataParallel": (data_parallel, "`nn.DataParallel`.*`torchrun`"),
    "engine withheld": (lambda: deepspeed_engine(3).module, "wrapped model"),
}
if hasattr(peft.optimizers, "create_riemannian_optimizer"):
    UNSERVED["Riemannian optimizer"] = (
        lambda: deepspeed_engine(3, riemannian),
        "RiemannianPreconditionedOptimizer.*DDP",
    )


def unserved() -> dict[str, str]:
    """What each said."""
    said = {}
    for name, (build, _) in UNSERVED.items():
        model = build()
        try:
            # LoRA-FA freezes lora_A, which the coordinator would map by default.
            attach(model, getattr(model, "optimizer", None) or adamw(model), side="write", **DATA)
            said[name] = "nothing"
        except StructLoRAError as error:
            said[name] = str(error)
        print(f"{name}: {said[name]}", file=sys.stderr)
    return said


# --- several parameter groups under DeepSpeed -----------------------------------------------------------------------

THETA_LR = 0.5
PEAKS = {"others": 0.1, "lora_A": 1e-3, "lora_B": 1e-2}


def grouped(model) -> torch.optim.Optimizer:
    """AdamW with groups of their own for what is no LoRA, for lora_A and for lora_B."""
    model.base_model.model.lm_head.weight.requires_grad_(True)
    groups = {part: {"params": [], "lr": rate} for part, rate in PEAKS.items()}
    for name, parameter in lora_parameters(model).items():
        groups[next((part for part in groups if part in name), "others")]["params"].append(parameter)
    return torch.optim.AdamW(groups.values())


def shares(stage: int, dtype: str | None, scheduler: dict | None) -> list[float]:
    """Shares of its peak that Θ's rate is in three steps, over which LoRA's groups are halved or follow DeepSpeed's schedule."""
    engine = deepspeed_engine(stage, grouped, scheduler=scheduler, dtype=dtype)
    # By default the rate is that of the group of the factors that are coordinated, here lora_A's.
    options, peak = ({"coordinator_lr": THETA_LR}, THETA_LR) if scheduler else ({}, PEAKS["lora_A"])
    runtime = attach(engine, engine.optimizer, **options, **DATA)
    found = []
    for step in range(3):
        if not scheduler:
            for group, (part, rate) in zip(engine.optimizer.param_groups, PEAKS.items(), strict=True):
                group["lr"] = rate / 2**step if part != "others" else rate
        engine.train()
        engine.backward(loss_of(engine, "llama", step))
        engine.step()
        found.append(runtime.optimizer.param_groups[0]["lr"] / peak)
    runtime.detach()
    return found


def groups() -> dict[str, dict[str, list[float]]]:
    warm_up = {"warmup_min_lr": 0, "warmup_max_lr": 1e-2, "warmup_num_steps": 2, "warmup_type": "linear"}
    schedules = {"groups": None, "WarmupLR": {"type": "WarmupLR", "params": warm_up}}
    return {
        f"{stage} {dtype}": {name: shares(stage, dtype, schedule) for name, schedule in schedules.items()}
        for stage, dtype in ((1, None), (2, None), (3, None), (1, "bf16"))
    }


if __name__ == "__main__":
    dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
    print(json.dumps({"unserved": unserved, "groups": groups}[sys.argv[1]]()), flush=True)
    os._exit(0)
