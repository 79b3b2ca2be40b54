"""FSDP2 in one process: readers within a step, and weights that others write. Prints one JSON line of differences, all of them 0
up to rounding except `effect`."""

from __future__ import annotations

import json
import os

os.environ.update(
    HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1"
)

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from structlora_trl import attach
from tests.support.tiny import adamw, logits_of, lora_parameters, loss_of, peft_model

torch.set_num_threads(1)


def trained(reads: bool):
    model, mesh = peft_model(), init_device_mesh("cpu", (1,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = adamw(model)
    runtime = attach(model, optimizer)
    model.train()
    for seed in range(3):
        loss = loss_of(model, "llama", seed)
        if reads:
            logits_of(model, "llama")
        loss.backward()
        if reads:
            logits_of(model, "llama")
        optimizer.step()
        optimizer.zero_grad()
    return model, runtime


def after_a_training_forward(model):
    model.train()
    loss_of(model, "llama", 7)
    return logits_of(model, "llama")


def after_a_step_without_a_backward():
    """A root that FSDP2 leaves gathered after a forward: a caller that skips the backward steps then."""
    model = fully_shard(peft_model("llama", "warm"), mesh=init_device_mesh("cpu", (1,)))
    optimizer = adamw(model)
    runtime = attach(model, optimizer)
    before = runtime.state_dict()
    model.train()
    loss_of(model, "llama", 0)
    optimizer.step()
    after = runtime.state_dict()
    return max(difference(after[n], before[n]) for n in before if "latent" in n)


def difference(left, right) -> float:
    return (left - right).abs().max().item()


def main():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    undisturbed = trained(reads=False)[1].state_dict()
    model, runtime = trained(reads=True)
    read = runtime.state_dict()
    found = {"readers": max(difference(read[n], undisturbed[n]) for n in read if "latent" in n)}
    before = logits_of(model, "llama")
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.mul_(0.5)
    written = logits_of(model, "llama")
    runtime.reload()
    found |= {
        "effect": difference(written, before),
        "in place": difference(after_a_training_forward(model), written),
    }
    after_a_training_forward(model)
    shown = {
        name: value for name, value in model.state_dict().items() if "lora" in name
    }  # training weights stand
    model.load_state_dict(shown, strict=False)
    runtime.reload()
    found["state_dict"] = difference(after_a_training_forward(model), written)
    found["step without a backward"] = after_a_step_without_a_backward()
    print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
