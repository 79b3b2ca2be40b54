"""Trains under DeepSpeed with several parameter groups; prints, as JSON, the shares of their rates that Θ gets.

A script, since process groups and DeepSpeed keep global state.
"""

from __future__ import annotations

import json
import os
import tempfile

os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", LOCAL_RANK="0")

import deepspeed
import torch
import torch.distributed as dist

from structlora_trl import attach
from tests.support.device import without_shm_op
from tests.support.tiny import DATA, lora_parameters, loss_of, peft_model

THETA_LR, STEPS = 0.5, 3


def groups(model) -> list[dict]:
    named = lora_parameters(model).items()
    other = [{"params": [p for n, p in named if "lora_" not in n], "lr": 0.1}]
    return other + [
        {"params": [p for n, p in named if f in n], "lr": r} for f, r in (("lora_A", 1e-3), ("lora_B", 1e-2))
    ]


def shares(stage: int, dtype: str | None, scheduler: dict | None) -> list[float]:
    model = peft_model()
    model.base_model.model.lm_head.weight.requires_grad_(True)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    config |= {"zero_optimization": {"stage": stage}}
    if dtype:
        config |= {dtype: {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if scheduler:
        config |= {
            "scheduler": scheduler,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        }
        engine = deepspeed.initialize(model=model, model_parameters=groups(model), config=config)[0]
    else:
        engine = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups(model)), config=config)[
            0
        ]
    # By default the rate is that of the group of the factors that are coordinated, here lora_A's.
    options, peak = ({"coordinator_lr": THETA_LR}, THETA_LR) if scheduler else ({}, 1e-3)
    runtime = attach(engine, engine.optimizer, **options, **DATA)
    found = []
    for step in range(STEPS):
        if not scheduler:  # by hand: LoRA's groups are halved, the other one stays
            for group, rate in zip(
                engine.optimizer.param_groups, (0.1, 1e-3 / 2**step, 1e-2 / 2**step), strict=True
            ):
                group["lr"] = rate
        engine.train()
        engine.backward(loss_of(engine, "llama", step))
        engine.step()
        found.append(runtime.optimizer.param_groups[0]["lr"] / peak)
    runtime.detach()
    return found


def main():
    without_shm_op()
    dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
    warm_up = {"warmup_min_lr": 0, "warmup_max_lr": 1e-2, "warmup_num_steps": 2, "warmup_type": "linear"}
    found = {}
    for name, stage, dtype in (("1", 1, None), ("2", 2, None), ("3", 3, None), ("1 bf16", 1, "bf16")):
        found[name] = {
            "groups": shares(stage, dtype, None),
            "WarmupLR": shares(stage, dtype, {"type": "WarmupLR", "params": warm_up}),
        }
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
