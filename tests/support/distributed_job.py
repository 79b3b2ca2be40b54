"""One rank of a distributed SFT job with the callback alone; started by a launcher, or alone for the one-process run.

Prints one JSON line on rank 0 with what really ran; the state goes to OUTPUT/state.pt.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

from tests.support.device import BACKEND, ON_GPU, hide_gpus, without_shm_op

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
if not ON_GPU:
    hide_gpus()

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from transformers import TrainerCallback

from structlora_trl import gating
from structlora_trl.core.graph import DepthGraph
from structlora_trl.engines import base

torch.set_num_threads(1)
DepthGraph.redraw_every = 2  # edges change while a short run lasts

CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"
MESHES = {  # FSDP2's, by the number of processes
    "fsdp2": lambda world: {},
    "hsdp": lambda world: {"dp_replicate_size": 2, "dp_shard_size": world // 2},
    "cp": lambda world: {"dp_shard_size": world // 2, "cp_size": 2},
}
LOADED = {  # sharded by Transformers itself, as the base is loaded: its `DistributedConfig`, by the number of processes
    "loaded_fsdp2": lambda world: {"fsdp_size": world},
    "loaded_hsdp": lambda world: {"dp_replicate_size": 2, "fsdp_size": world // 2},
    "loaded_replicas": lambda world: {"dp_replicate_size": world},
    "loaded_experts": lambda world: {"fsdp_size": world, "ep_size": world},
}


# What a job can be told, and what it does otherwise.
DEFAULTS = {
    "family": "llama",  # a model of `tiny.FAMILIES`
    "steps": 10,
    "accumulation": 1,
    "micro_batch": 6,  # over all ranks, so that 1, 2 and 3 see the same
    "rows": 48,
    "dtype": "float32",  # or bfloat16, float16
    "method": {},  # more StructLoRA options, or None for plain LoRA; no gates, unless they say so
    "subclass": False,  # StructLoRASFTTrainer instead of the callback
    "lora": {},  # more LoraConfig options
    "vera": None,  # VeraConfig options: VeRA instead of LoRA
    "freeze": None,  # parameters whose name holds this
    "trainer": {},  # more training arguments
    "deepspeed": {},  # merged into the DeepSpeed config
    "sequence_parallel": 1,  # ranks that share a row, under DeepSpeed
    "resume": None,  # a checkpoint
    "stop_at": None,  # a step
    "again": False,  # call `train` a second time
    "anew": False,  # with the model wrapped and the optimizer built anew
    "plain_after": None,  # a step where the run breaks off; then plain LoRA is trained, wrapped and with an optimizer anew
    "halve_between": False,  # with lora_B halved before that
    "whole_widths": False,  # have PEFT make adapters as wide as their base
    "never_average": False,  # keep Trainer from averaging a replicated adapter
    "method_of_rank_1": {},  # options that this rank alone has
    "poison_at": None,  # step at which the loss is NaN
    "kill": None,  # {"rank": 1, "step": 4, "in": "step", "save" or "pullback"}
    "group_timeout": None,  # seconds
}


def arguments() -> SimpleNamespace:
    """Of the command line: a folder, an engine, and options as JSON. The engine is 'single', 'ddp', a name of `MESHES` or
    `LOADED`, a file of configs/deepspeed, or 'launcher' for whatever the launcher has set up.
    """
    output, engine, told = (word for word in sys.argv[1:] if not word.startswith("--local_rank"))
    told = json.loads(told)
    assert told.keys() <= DEFAULTS.keys(), told
    return SimpleNamespace(output=Path(output), engine=engine, **{**DEFAULTS, **told})


def deepspeed_config(args) -> dict:
    import deepspeed

    if not ON_GPU:
        without_shm_op()
    if args.dtype == "float16" and not ON_GPU:
        # DeepSpeed offers fp16 on accelerators alone; CPUs compute it, slowly.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    timeout = {}
    if args.group_timeout:
        timeout["timeout"] = datetime.timedelta(seconds=args.group_timeout)
        # DeepSpeed reduces in groups that it makes with the backend's default (transformers issue 32036).
        dist.distributed_c10d.default_pg_timeout = timeout["timeout"]
    deepspeed.init_distributed(dist_backend=BACKEND, auto_mpi_discovery=False, **timeout)
    if args.engine == "launcher":
        return {}
    config = json.loads((CONFIGS / f"{args.engine}.json").read_text())
    for key, value in args.deepspeed.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) and key in config else value
    return {"deepspeed": config}


def offer_fsdp2_on_cpu() -> None:
    """Accelerate offers FSDP2 on accelerators alone, and would run DDP in silence; on CPU the sharding is the same."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    import accelerate.state
    import transformers.training_args
    from accelerate.utils import DistributedType

    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    accelerate.state.PartialState._prepare_backend = lambda *args, **kwargs: (
        "gloo",
        DistributedType.MULTI_GPU,
    )


def load_sharded(base, distributed: dict):
    """The base as `from_pretrained(distributed_config=...)` returns it."""
    from transformers.distributed import DistributedConfig

    return type(base).from_pretrained(
        None,
        config=base.config,
        state_dict=base.state_dict(),
        distributed_config=DistributedConfig(**distributed),
    )


class PoisonAt(TrainerCallback):
    def __init__(self, step):
        self.at, self.hook = step, None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.at:
            embeddings = model.get_input_embeddings()
            self.hook = embeddings.register_forward_hook(lambda module, inputs, output: output * float("nan"))

    def on_step_end(self, args, state, control, **kwargs):
        if self.hook is not None:
            self.hook.remove()
            self.hook = None


class BreakOffAt(TrainerCallback):
    def __init__(self, step):
        self.at = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise KeyboardInterrupt


class KillAt(TrainerCallback):
    """Kill this process outright between two steps, inside the save after that step, or inside the step's pullback."""

    def __init__(self, fault):
        self.step, self.place = fault["step"], fault["in"]

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step != self.step:
            return
        if self.place == "step":
            self._die()
        elif self.place == "pullback":
            from structlora_trl.core.mapping import KindMap

            KindMap.pullback = self._die
        else:
            os.fsync = self._die  # written, not yet in its place

    def _die(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)


class Counted:
    """What the map sends: the collectives of its modules, and the bytes that leave this rank."""

    def __init__(self):
        self.bytes_sent = self.collectives = 0
        for module in (base, gating):
            module.dist = self

    def __getattr__(self, name):
        return getattr(dist, name)

    def all_reduce(self, tensor, op=dist.ReduceOp.SUM, group=None):
        world = dist.get_world_size(group)
        self._count(2 * (world - 1) * tensor.numel() * tensor.element_size() // world)
        dist.all_reduce(tensor, op, group=group)

    def _count(self, leaving: int) -> None:
        self.collectives += 1
        self.bytes_sent += leaving


def halve(trainer, kinds) -> None:
    """What another adapter loaded between two runs does: other values, for the model and for the optimizer."""
    from structlora_trl.engines import select_engine

    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # Accelerate's wrapper has it
    engine = select_engine(trainer.model_wrapped, optimizer, kinds)
    for kind in kinds:
        layout = base.Layout(engine, kind.B)
        engine.write(kind.B, layout.gather(layout.join(map(engine.values, kind.B))) / 2)


def main():
    args = arguments()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    options = {
        "per_device_train_batch_size": args.micro_batch // world,
        "gradient_accumulation_steps": args.accumulation,
        "max_steps": args.steps,
        "bf16": args.dtype == "bfloat16",
        "fp16": args.dtype == "float16",
        "optim": "adamw_torch",
        "logging_steps": 1,
        "lora": args.lora,
        "vera": args.vera,
        **args.trainer,
    }
    if args.engine.startswith("zero") or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        from transformers.integrations import HfDeepSpeedConfig  # noqa: F401  (imported before the config is built)

        options |= deepspeed_config(args)
        if args.sequence_parallel > 1:
            from accelerate.utils import DeepSpeedSequenceParallelConfig  # from accelerate 1.12 on

            options["parallelism_config"] = ParallelismConfig(
                sp_size=args.sequence_parallel,
                sp_handler=DeepSpeedSequenceParallelConfig(sp_attn_implementation="sdpa"),
            )
            options["per_device_train_batch_size"] *= args.sequence_parallel
    elif args.group_timeout:
        dist.init_process_group(BACKEND, timeout=datetime.timedelta(seconds=args.group_timeout))

    if args.engine in MESHES:
        if not ON_GPU:
            offer_fsdp2_on_cpu()
        layers = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        options |= {
            "use_cpu": False,
            "fsdp": True,
            "fsdp_config": {**layers, **args.trainer.get("fsdp_config", {})},
        }
        mesh = MESHES[args.engine](world)
        if "cp_size" in mesh and not ON_GPU:
            from tests.support.ring_on_cpu import offer_ring_attention_on_cpu

            offer_ring_attention_on_cpu()
        if mesh:
            options["parallelism_config"] = ParallelismConfig(**mesh)
            sharers = mesh.get("cp_size", 1)  # of one row
            options["per_device_train_batch_size"] = args.micro_batch * sharers // world
    elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
        offer_fsdp2_on_cpu()
        options["use_cpu"] = False

    from structlora_trl import StructLoRACallback, StructLoRASFTConfig, StructLoRASFTTrainer
    from tests.support.jobs import StopAt, sft
    from tests.support.tiny import base_model, standing

    if args.method is not None:
        args.method = {"gates": "off", **args.method, **(args.method_of_rank_1 if rank == 1 else {})}
    callback = StructLoRACallback(args.method) if args.method is not None and not args.subclass else None
    others = [
        callback,
        args.stop_at is not None and StopAt(args.stop_at),
        args.plain_after is not None and BreakOffAt(args.plain_after),
        args.poison_at is not None and PoisonAt(args.poison_at),
        args.kill is not None and rank == args.kill["rank"] and KillAt(args.kill),
    ]
    callbacks = [c for c in others if c]
    if args.subclass:
        options |= {
            "trainer_class": StructLoRASFTTrainer,
            "config_class": StructLoRASFTConfig,
            "structlora": args.method,
        }
    base = base_model(args.family)
    if args.engine in LOADED:
        base = load_sharded(base, LOADED[args.engine](world))
    if args.whole_widths:
        # Else PEFT 0.21 makes them as wide as a shard, under HSDP.
        import peft.tuners.tuners_utils

        peft.tuners.tuners_utils._torch_supports_distributed = False
    trainer = sft(args.output, callbacks, model=base, row_count=args.rows, **options)
    if args.never_average:
        trainer._sync_replicated_trainable_parameters = lambda model: None
    if args.subclass:
        callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, StructLoRACallback))
    for name, parameter in trainer.model.named_parameters():
        if args.freeze is not None and args.freeze in name:
            parameter.requires_grad_(False)
    counted = Counted()
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=args.resume)
    if args.plain_after is not None:
        for other in callbacks:
            trainer.remove_callback(other)
        trainer.model_wrapped, trainer.optimizer = trainer.model, None
        trainer.train()
    if args.again:
        if args.halve_between:
            halve(trainer, callback.runtime.kinds)
        if args.anew:
            trainer.model_wrapped, trainer.optimizer = trainer.model, None
        trainer.train()

    wrapped = trainer.model_wrapped
    is_deepspeed = type(wrapped).__name__ == "DeepSpeedEngine"
    facts = {
        "wrapped": type(wrapped).__name__,
        "trains": 2 if args.again else 1,
        "world": dist.get_world_size() if dist.is_initialized() else 1,
        "device": trainer.args.device.type,
        "backend": dist.get_backend() if dist.is_initialized() else None,
        "stage": wrapped.zero_optimization_stage() if is_deepspeed else None,
        "optimizer": type(wrapped.optimizer).__name__ if is_deepspeed else None,
        "offload": bool(is_deepspeed and wrapped.zero_cpu_offload()),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "norms": [float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry],
    }
    if callback is not None:
        runtime = callback.runtime
        facts |= {"engine": runtime.engine.name, "step": runtime.step, "skipped": runtime.skipped_steps}
        facts["gates_stand"] = runtime._close_gates.alive
        if is_deepspeed or args.engine in MESHES:
            facts |= {"bytes_sent": counted.bytes_sent, "collectives": counted.collectives}
        if args.engine in LOADED:
            facts["base"] = [str(p) for p in trainer.model.get_input_embeddings().weight.placements]
            facts["adapter"] = sorted({type(p.data).__name__ for p in runtime.lora_parameters()})
        if args.engine in MESHES:
            parameter = runtime.kinds[0].B[0]
            mesh = parameter.device_mesh
            facts["mesh"] = dict(zip(mesh.mesh_dim_names or ["all"], mesh.shape, strict=True))
            facts["placements"] = [str(placement) for placement in parameter.placements]
    trainer.save_model(str(args.output / "adapter"))
    if dist.is_initialized():
        dist.barrier()
    state = None
    if callback is not None:
        stands = zip(runtime.kinds, standing(runtime), strict=True)
        weights = {f"{kind.name}/{side}": x for kind, pair in stands for side, x in pair._asdict().items()}
        state = weights | (callback._finished or {})
    if rank == 0:
        if callback is not None:
            torch.save(state, args.output / "state.pt")
        print("FACTS " + json.dumps(facts), flush=True)
    if dist.is_initialized():
        dist.barrier()
        # All is done and written. Tearing down gloo's threads beside DeepSpeed's now and then aborts the interpreter
        # ("terminate called without an active exception"), so leave without; errors never get here.
        os._exit(0)


if __name__ == "__main__":
    main()
