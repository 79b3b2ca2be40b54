"""Bare loops with `attach` on every engine, one after the other in the same processes; started by torchrun.

`train` is one run. It also serves as the one-process reference, in the test's own process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import weakref
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from structlora_trl import attach
from tests.support.device import without_shm_op
from tests.support.tiny import FAMILIES, base_model, lora_parameters, peft_model, warm_up

STEPS = 6
TARGETS = ["q_proj", "v_proj", "o_proj"]
RATE = 1e-2
# Adam moves an element by its full rate whichever sign rounding gives a gradient of 1e-9; this epsilon takes that out.
EPSILON = 1e-6
LOSS_SCALE_POWER = 10
# Far from every cosine that these runs come to: rounding changes no edge.
SEMANTIC = {"edges": "similarity", "semantic_every": 2, "semantic_threshold": 0.2}


class Loop:
    """One process, or DDP: a torch optimizer, with a GradScaler where the loss is to be scaled.

    Args:
        clip: the largest norm of gradients.
        scaled: scale the loss, and leave it to the optimizer to unscale the gradients.
        adamw: options of AdamW.
    """

    def __init__(self, model, clip: float | None, scaled: bool, adamw: dict):
        self.clip = clip
        self.wrapped = self.wrap(model)
        # Of the optimizers of torch, the fused ones unscale in their step.
        self.optimizer = torch.optim.AdamW(lora_parameters(model).values(), **adamw, fused=scaled)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**LOSS_SCALE_POWER, enabled=scaled)

    def wrap(self, model):
        return DistributedDataParallel(model) if dist.is_initialized() else model

    def step(self, loss) -> None:
        self.scaler.scale(loss).backward()
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(lora_parameters(self.wrapped).values(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


class FSDP2(Loop):
    """`fully_shard` of the whole model, and of each layer where `layers` says so; over one mesh dimension, or as accelerate
    does with these sizes.
    """

    def __init__(self, *args, layers: bool = False, sizes: dict | None = None, **sharding):
        self.layers, self.sharding = layers, sharding
        if sizes is not None:
            parallelism = ParallelismConfig(**sizes)
            sharding["mesh"] = parallelism.build_device_mesh("cpu")[tuple(parallelism.fsdp_dim_names)]
        super().__init__(*args)

    def wrap(self, model):
        for layer in model.base_model.model.model.layers if self.layers else ():
            fully_shard(layer)
        return fully_shard(model, **self.sharding)


class TensorParallel(Loop):
    """Transformers' `tp_plan`, over all ranks. They see the same rows."""

    def __init__(self, model, clip: float | None, scaled: bool, adamw: dict):
        super().__init__(model, clip, scaled, adamw)
        # As Trainer does: torch's batched optimizers cannot mix parameters that are sliced with whole ones.
        of_kind = {}
        for parameter in lora_parameters(model).values():
            of_kind.setdefault(type(parameter.data), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters} for parameters in of_kind.values()], **adamw
        )

    def wrap(self, model):
        return model


class Loaded(TensorParallel):
    """A base that Transformers shards (FSDP2) as it loads it, and an adapter of which every rank has all, averaged here."""

    def step(self, loss) -> None:
        loss.backward()
        for parameter in lora_parameters(self.wrapped).values():
            if not isinstance(parameter, DTensor) and parameter.grad is not None:
                dist.all_reduce(parameter.grad, dist.ReduceOp.AVG)
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(lora_parameters(self.wrapped).values(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


class DeepSpeed:
    """ZeRO at a stage, with more options of ZeRO; every parameter is really sharded at stage 3."""

    def __init__(self, model, clip: float | None, scaled: bool, adamw: dict, stage: int, **zero):
        import deepspeed

        without_shm_op()
        # DeepSpeed offers fp16 on accelerators alone; CPUs compute it, slowly.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": clip or 0.0,
            "fp16": {"enabled": scaled, "initial_scale_power": LOSS_SCALE_POWER},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
        }
        optimizer = torch.optim.AdamW(lora_parameters(model).values(), **adamw)
        self.wrapped, self.optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config
        )

    def step(self, loss) -> None:
        self.wrapped.backward(loss)
        self.wrapped.step()


class Counting:
    """Wraps the `step` of DeepSpeed's engine on the instance, as other libraries do, and counts its calls."""

    def __init__(self, engine):
        self.step, self.calls = engine.step, 0
        engine.step = self

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.step(*args, **kwargs)


ENGINES = {
    "ddp": Loop,
    "fsdp2": FSDP2,
    "fsdp2 resharding": partial(FSDP2, reshard_after_forward=True),
    "fsdp2 layers": partial(FSDP2, layers=True),
    "fsdp2 layers resharding": partial(FSDP2, layers=True, reshard_after_forward=True),
    **{f"zero{stage}": partial(DeepSpeed, stage=stage) for stage in (1, 2, 3)},
    "tp": TensorParallel,
    "loaded": Loaded,
    # Of four processes.
    "fsdp2 contexts": partial(FSDP2, sizes={"dp_shard_size": 2, "cp_size": 2}),
    "hsdp": partial(FSDP2, sizes={"dp_replicate_size": 2, "dp_shard_size": 2}),
    "zero3 hpz": partial(DeepSpeed, stage=3, zero_hpz_partition_size=2),
}


def train(
    engine: str = "ddp",
    method: dict | None = None,
    clip: float | None = None,
    scaled: bool = False,
    poison_at: int | None = None,
    detach_at: int | None = None,
    again_at: int | None = None,
    freeze: str | None = None,
    as_loaded: bool = False,
    four_bits: bool = False,
    experts: str | None = None,
    epsilon: float = EPSILON,
) -> dict:
    """One run of a bare loop.

    Args:
        engine: a name of `ENGINES`; 'ddp' without a process group is one process.
        method: more StructLoRA options.
        clip: the largest norm of gradients.
        scaled: scale the loss, as mixed precision does.
        poison_at: step at which the gradient of the embeddings, which are trained too, is NaN.
        detach_at: step before which StructLoRA is detached; the rest is plain LoRA.
        again_at: step before which it is attached again.
        freeze: freeze parameters whose name holds this.
        as_loaded: leave the base model in `eval()`, as `from_pretrained` returns it.
        four_bits: quantise the base model, into the dtype that is trained, so that FSDP2 can shard it.
        experts: a mixture, whose experts are adapted: 'stacked' in one parameter of each layer, or modules 'apart'.
        epsilon: AdamW's.

    Returns:
        `dict`: `losses` and `evaluation_losses` before each step, means over the ranks, and at the end `working` weights,
        `state` and `skipped` of the last runtime. Of a run that detaches, also `is_kept`, whether the model is still there
        when the runtime alone is left, `wrapper_calls` of those who wrapped DeepSpeed's step before us, and after us unless
        it is attached again, and whether the last of them stands at the end, `wrapper_stands`.
    """
    if four_bits:
        model = _quantised()
    elif experts == "stacked":
        model = _mixture()
    elif experts == "apart":
        model = peft_model("mixture", "warm", targets=["q_proj", "up_proj", "down_proj"])
    else:
        distributed = {"tp": {"tp_plan": "auto"}, "loaded": {"distributed_config": {"fsdp_size": 2}}}.get(
            engine
        )
        model = _sliced(**distributed) if distributed else peft_model("llama", "warm", targets=TARGETS)
    for name, parameter in model.named_parameters():
        if freeze is not None and freeze in name:
            parameter.requires_grad_(False)
    if poison_at is not None:
        model.get_input_embeddings().weight.requires_grad_(True)
    loop = ENGINES[engine](model, clip, scaled, {"lr": RATE, "eps": epsilon})
    method = method or {}
    options = {**({} if method.get("coordinator") == "none" else SEMANTIC), **method}
    wraps = isinstance(loop, DeepSpeed) and detach_at is not None
    wrappers = [Counting(loop.wrapped)] if wraps else []
    runtime = attach(loop.wrapped, loop.optimizer, options)
    if wraps and again_at is None:
        wrappers.append(Counting(loop.wrapped))
    losses, evaluation_losses = [], []
    for step in range(STEPS):
        if step == detach_at:
            runtime.detach()
            runtime.detach()
        if step == again_at:
            runtime = attach(loop.wrapped, loop.optimizer, options)
        batch = FAMILIES["llama"].batch(step)
        if engine != "tp":
            batch = _share_of_rank(batch)
        loop.wrapped.eval()
        with torch.no_grad():
            evaluation_losses.append(_mean(loop.wrapped(**batch).loss))
        loop.wrapped.train()
        if as_loaded:
            model.get_base_model().eval()
        hook = model.get_input_embeddings().register_forward_hook(_poison) if step == poison_at else None
        loss = loop.wrapped(**batch).loss
        losses.append(_mean(loss))
        loop.step(loss)
        if hook is not None:
            hook.remove()
    finished = {
        "engine": runtime.engine.name,
        "losses": losses,
        "evaluation_losses": evaluation_losses,
        "working": whole(runtime, runtime.engine.read_working()),
        "state": runtime.state_dict(),
        "skipped": runtime.skipped_steps,
    }
    if detach_at is not None:
        runtime.detach()
        finished["wrapper_calls"] = [wrapper.calls for wrapper in wrappers]
        finished["wrapper_stands"] = wraps and vars(loop.wrapped).get("step") is wrappers[-1]
        if isinstance(loop, DeepSpeed):
            loop.wrapped.destroy()  # without which its hooks keep it
        let_go = weakref.ref(model)
        del model, loop, loss, parameter, wrappers
        gc.collect()
        finished["is_kept"] = let_go() is not None
        runtime.state_dict(), runtime.metrics(), runtime.engine.read_working()
    return finished


def whole(runtime, factors) -> list[torch.Tensor]:
    """A rank's slices joined with those of the others."""
    return [
        slices.whole(part, side)
        for slices, pair in zip(runtime.engine.slices, factors, strict=True)
        for side, part in zip("AB", pair, strict=True)
    ]


def _quantised():
    from tests.support.setups import quantised

    base = quantised(4, storage=torch.float32)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    warm_up(model)
    return model


def _mixture():
    torch.manual_seed(0)
    base = FAMILIES["mixtral"].build()
    torch.manual_seed(1)
    stacks = FAMILIES["mixtral"].parameters
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=stacks)
    model = get_peft_model(base, lora)
    warm_up(model)
    return model


@torch.no_grad()
def _sliced(**distributed):
    """`peft_model`, cut over the ranks by Transformers and PEFT: `distributed` are options of `from_pretrained`."""
    whole = peft_model("llama", "warm", targets=TARGETS)
    base = base_model("llama")
    sliced = type(base).from_pretrained(None, config=base.config, state_dict=base.state_dict(), **distributed)
    model = get_peft_model(sliced, whole.peft_config["default"], autocast_adapter_dtype=False)
    values = dict(whole.named_parameters())
    for name, parameter in lora_parameters(model).items():
        value = values[name]
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)
    for module in model.modules() if "tp_plan" in distributed else ():
        # Of modules cut by rows, PEFT 0.21 declares the width of a slice, where Transformers 5.24 reads the whole one.
        if isinstance(module, torch.nn.Linear):
            module.in_features = module.weight.shape[1]
    return model


def _poison(module, inputs, output):
    output.register_hook(lambda gradient: gradient * float("nan"))


def _share_of_rank(batch: dict) -> dict:
    """Its rows of a batch; where there are more ranks than rows, several have the same."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    parts = min(world, len(batch["input_ids"]))
    return {name: value[rank % parts :: parts] for name, value in batch.items()}


def _mean(loss) -> float:
    loss = loss.detach().float().clone()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss.item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", type=json.loads, help="a list of `train`'s options")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    finished = [train(**options) for options in args.runs]
    if dist.get_rank() == 0:
        torch.save(finished, args.output)
    dist.barrier()
    os._exit(0)  # see `distributed_job`


if __name__ == "__main__":
    main()
