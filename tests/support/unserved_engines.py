"""Attaches to models that are owned in ways which no engine serves; prints, as JSON, what each said.

A script, since process groups and DeepSpeed keep global state. One process is enough: an engine is detected from its objects.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from types import SimpleNamespace

os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", LOCAL_RANK="0")

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
from tests.support.tiny import DATA, adamw, lora_parameters, peft_model


def part_of_the_model():
    model = peft_model()
    fully_shard(model.base_model.model.model.layers[0])
    return model


def tensor_parallel():
    return distribute_module(peft_model(), init_device_mesh("cpu", (1,)))


def fsdp1():
    return FullyShardedDataParallel(peft_model(), use_orig_params=True, device_id=torch.device("cpu"))


def deepspeed_stage(stage: int, optimizer=adamw, **zero):
    import deepspeed

    without_shm_op()
    model = peft_model()
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    config |= {"zero_optimization": {"stage": stage, **zero}}
    return deepspeed.initialize(model=model, optimizer=optimizer(model), config=config)[0]


def pipeline():
    from deepspeed import PipelineEngine

    engine = deepspeed_stage(1)
    engine.__class__ = PipelineEngine
    return engine


def other_optimizer(name: str):
    engine = deepspeed_stage(3)
    engine.optimizer.__class__ = type(name, (type(engine.optimizer),), {})
    return engine


def with_optimizer(**attributes):
    # What an NVMe drive or a GPU would bring about.
    engine = deepspeed_stage(2)
    for name, value in attributes.items():
        setattr(engine.optimizer, name, value)
    return engine


def muon():
    engine = deepspeed_stage(2)
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


def engine_withheld():
    return deepspeed_stage(3).module


CASES = {
    "FSDP2 of a part": part_of_the_model,
    "tensor parallelism": tensor_parallel,
    "FSDP1": fsdp1,
    "ZeRO stage 0": lambda: deepspeed_stage(0),
    "pipeline": pipeline,
    "ZeRO++": lambda: deepspeed_stage(2, zero_quantized_gradients=True),
    "MiCS": lambda: other_optimizer("MiCS_Optimizer"),
    "another optimizer of DeepSpeed's": lambda: other_optimizer("SuperOffloadOptimizer_Stage3"),
    "NVMe": lambda: with_optimizer(swap_optimizer=True),
    "Muon": muon,
    "torch_autocast": lambda: with_optimizer(torch_autocast_gradscaler=SimpleNamespace()),
    "LoRA-FA's optimizer": lambda: deepspeed_stage(2, lorafa),
    "a kind in several groups": lambda: deepspeed_stage(2, by_layers),
    "partial offload": lambda: with_optimizer(backup_optimizer=object(), partial_offload=0.5),
    "DataParallel": data_parallel,
    "engine withheld": engine_withheld,
}
if hasattr(peft.optimizers, "create_riemannian_optimizer"):
    CASES["Riemannian optimizer"] = lambda: deepspeed_stage(3, riemannian)


def main():
    dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
    said = {}
    for name, build in CASES.items():
        model = build()
        try:
            # LoRA-FA freezes lora_A, which the coordinator would map by default.
            attach(model, getattr(model, "optimizer", None) or adamw(model), side="write", **DATA)
            said[name] = "nothing"
        except StructLoRAError as error:
            said[name] = str(error)
        print(f"{name}: {said[name]}", file=sys.stderr)
    print(json.dumps(said), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
