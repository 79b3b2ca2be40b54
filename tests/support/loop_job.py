"""Bare loops with `attach` on every engine, one after the other in the same processes; started by torchrun.

`train` is one run. It also serves as the one-process reference, in the test's own process.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from unittest.mock import patch

if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from structlora_trl import StructLoRAError, attach
from structlora_trl.core.gates import Gate
from structlora_trl.core.graph import DepthGraph
from structlora_trl.core.mapping import Parts
from tests.support.device import without_shm_op
from tests.support.setups import lora, quantised
from tests.support.tiny import (
    DATA,
    FAMILIES,
    base_model,
    evaluation_factors,
    lora_parameters,
    peft_model,
    standing,
    warm_up,
)

STEPS, ROWS = 6, 2  # of a run, and of each batch
RATE = 1e-2
# Adam moves an element by its full rate whichever sign rounding gives a gradient of 1e-9; this epsilon takes that out.
EPSILON = 1e-6
LOSS_SCALE_POWER = 10
# Far from every cosine that these runs come to: rounding changes no edge.
SEMANTIC = {"edges": "similarity", "semantic_threshold": 0.2}


class FixedDraws(Gate):
    """Gates whose draws are of the rows of the whole batch, whichever rank has which."""

    step = 0

    def _drawn(self, activations, draw):
        generator = torch.Generator().manual_seed(self.step)
        whole = torch.randn(ROWS, activations.shape[-1], generator=generator)[:, None]
        return _of_rank(whole).to(activations.dtype)


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
        # As Trainer does: torch's batched optimizers cannot mix parameters that are sharded with whole ones.
        of_kind = {}
        for parameter in lora_parameters(model).values():
            of_kind.setdefault(type(parameter.data), []).append(parameter)
        groups = [{"params": parameters} for parameters in of_kind.values()]
        # Of the optimizers of torch, the fused ones unscale in their step.
        self.optimizer = torch.optim.AdamW(groups, **adamw, fused=scaled)
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
    """`fully_shard` of the whole model, and of each layer where `layers` says so."""

    def __init__(self, *args, layers: bool = False, **sharding):
        self.layers, self.sharding = layers, sharding
        super().__init__(*args)

    def wrap(self, model):
        for layer in model.base_model.model.model.layers if self.layers else ():
            fully_shard(layer)
        return fully_shard(model, **self.sharding)


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
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.AdamW(lora_parameters(model).values(), **adamw)
        self.wrapped, self.optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config
        )

    def step(self, loss) -> None:
        self.wrapped.backward(loss)
        self.wrapped.step()


ENGINES = {
    "ddp": Loop,
    "fsdp2": FSDP2,
    "fsdp2 resharding": partial(FSDP2, reshard_after_forward=True),
    "fsdp2 layers": partial(FSDP2, layers=True),
    "fsdp2 layers resharding": partial(FSDP2, layers=True, reshard_after_forward=True),
    **{f"zero{stage}": partial(DeepSpeed, stage=stage) for stage in (1, 2, 3)},
    "zero3 persistent": partial(DeepSpeed, stage=3, stage3_param_persistence_threshold=10**6),
}


@patch.object(DepthGraph, "redraw_every", 2)
def train(
    engine: str = "ddp",
    method: dict | None = None,
    steps: int = STEPS,
    clip: float | None = None,
    scaled: bool = False,
    poison_at: int | None = None,
    again_at: int | None = None,
    bypassed: bool = False,
    freeze: str | None = None,
    base: str = "llama",
    epsilon: float = EPSILON,
    fixed: bool = True,
) -> dict:
    """One run of a bare loop.

    Args:
        engine: a name of `ENGINES`; 'ddp' without a process group is one process.
        method: more StructLoRA options.
        steps: optimizer steps.
        clip: the largest norm of gradients.
        scaled: scale the loss, as mixed precision does.
        poison_at: step at which the gradient of the embeddings, which are trained too, is NaN.
        again_at: step before which StructLoRA is detached, and attached again.
        bypassed: take away a gate's hook, as code does that goes around a forward.
        freeze: freeze parameters whose name holds this.
        base: 'llama'; '4 bits' of it, in the dtype that is trained, so that FSDP2 can shard them; or a mixture whose
            experts are adapted, 'stacked' in one parameter of each layer or modules 'apart'.
        epsilon: AdamW's.
        fixed: have gates draw the same for a row wherever it is; or as they do, by each rank's generator.

    Returns:
        `dict`: `losses` and `evaluation_losses` before each step, means over the ranks; `stands`, whether at each moment
        outside a step the model held what the latents stand for, and a training forward changed nothing; `gates`, of each
        rank how many have fired, and their logits; and at the end `working` weights, `state` and `skipped`. Of a bypassed
        run, also what each rank `said`.
    """
    model = _model(base)
    for name, parameter in model.named_parameters():
        if freeze is not None and freeze in name:
            parameter.requires_grad_(False)
    if poison_at is not None:
        model.get_input_embeddings().weight.requires_grad_(True)
    loop = ENGINES[engine](model, clip, scaled, {"lr": RATE, "eps": epsilon})
    method = method or {}
    options = {**({} if method.get("coordinator") == "none" else SEMANTIC), **method}
    parts = Parts(gate=FixedDraws if fixed else None)

    def start():
        scaler = getattr(loop, "scaler", None)
        return attach(loop.wrapped, loop.optimizer, options, scaler=scaler, parts=parts, **DATA)

    runtime = start()
    gates = [module.gate for module in runtime.gating.modules]
    if bypassed:
        of_module = runtime.gating.modules[1].lora_A._forward_hooks
        of_module.pop(next(key for key, hook in of_module.items() if hook is gates[1]))
    losses, evaluation_losses, stands, said = [], [], True, []
    for step in range(steps):
        if step == again_at:
            runtime.detach()
            runtime = start()
        loop.wrapped.eval()
        with torch.no_grad():
            evaluation_losses.append(_mean(loop.wrapped(**_batch(step)).loss))
        before = _standing(runtime)
        loop.wrapped.train()
        FixedDraws.step = step
        hook = model.get_input_embeddings().register_forward_hook(_poison) if step == poison_at else None
        loss = loop.wrapped(**_batch(step)).loss
        losses.append(_mean(loss))
        stands &= _distance(before, _standing(runtime)) == 0
        try:
            loop.step(loss)
        except StructLoRAError as error:
            assert bypassed
            said = _of_ranks(str(error))
            break
        stands &= _distance(_flat(evaluation_factors(runtime)), _standing(runtime)) <= 1e-6
        if hook is not None:
            hook.remove()
    return {
        "engine": runtime.engine.name,
        "losses": losses,
        "evaluation_losses": evaluation_losses,
        "stands": stands,
        "gates": _of_ranks((sum(gate.has_fired for gate in gates), [gate.logits.tolist() for gate in gates])),
        "said": said,
        "working": _standing(runtime),
        "state": runtime.state_dict(),
        "skipped": runtime.skipped_steps,
    }


def _flat(factors) -> list[torch.Tensor]:
    return [factor for pair in factors for factor in pair]


def _standing(runtime) -> list[torch.Tensor]:
    return _flat(standing(runtime))


def _distance(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True) if a.numel())


def _of_ranks(fact) -> list:
    if not dist.is_initialized():
        return [fact]
    facts = [None] * dist.get_world_size()
    dist.all_gather_object(facts, fact)
    return facts


def _model(base: str):
    if base == "apart":
        return peft_model("mixture", "warm", targets=["q_proj", "up_proj", "down_proj"])
    config = lora()
    if base == "4 bits":
        model = quantised(4, storage=torch.float32)
    elif base == "stacked":
        model = base_model("mixtral")
        config.target_modules, config.target_parameters = {"q_proj"}, FAMILIES["mixtral"].parameters
    else:
        model = base_model("llama")
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    warm_up(model)
    return model


def _poison(module, inputs, output):
    output.register_hook(lambda gradient: gradient * float("nan"))


def _batch(step: int) -> dict:
    """This rank's rows of a batch."""
    return {name: _of_rank(value) for name, value in FAMILIES["llama"].batch(step).items()}


def _of_rank(rows: torch.Tensor) -> torch.Tensor:
    """This rank's rows; where there are more ranks than rows, several have the same."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    parts = min(world, len(rows))
    return rows[rank % parts :: parts]


def _mean(loss) -> float:
    loss = loss.detach().float().clone()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss.item()


def main():
    """Of the command line: a file to write to, and a list of `train`'s options as JSON."""
    output, runs = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    finished = [train(**options) for options in json.loads(runs)]
    if dist.get_rank() == 0:
        torch.save(finished, output)
    dist.barrier()
    os._exit(0)  # see `distributed_job`


if __name__ == "__main__":
    main()
