"""One rank's shards of an adapter are written by other code; started by torchrun with two processes.

Prints on the first rank, as JSON, what each engine said of it on each rank.
"""

from __future__ import annotations

import json
import os

os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from structlora_trl import StructLoRAError, attach
from tests.support import loop_job
from tests.support.device import without_shm_op
from tests.support.tiny import FAMILIES, adamw, peft_model


def of_zero(stage):
    without_shm_op()
    model = peft_model("llama", "warm")
    loop = loop_job.DeepSpeed(model, None, False, {"lr": 1e-2, "eps": 1e-6}, stage=stage)
    return loop.wrapped, loop.optimizer


def of_fsdp2():
    mesh = init_device_mesh("cpu", (2,))
    model = peft_model("llama", "warm")
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    model = fully_shard(model, mesh=mesh)
    return model, adamw(model)


def write(parameter):
    """What the first rank has."""
    with torch.no_grad():
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if dist.get_rank() == 0:
                    parameter.data[0].mul_(0.5)
        elif dist.get_rank() == 0:
            parameter.mul_(0.5)  # its shard alone


ENGINES = {"ZeRO-3": lambda: of_zero(3), "FSDP2": of_fsdp2}


def main():
    dist.init_process_group("gloo")
    said = {}
    for name, build in ENGINES.items():
        model, optimizer = build()
        runtime = attach(model, optimizer)
        model.train()
        model(**FAMILIES["llama"].batch(0))
        runtime.eval()
        write(runtime.kinds[0].B[0])
        try:
            model(**FAMILIES["llama"].batch(1))
            message = "nothing"
        except StructLoRAError as error:
            message = str(error)
        said[name] = [None, None]
        dist.all_gather_object(said[name], message)
        runtime.detach()
    if dist.get_rank() == 0:
        print(json.dumps(said), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
