"""One rank of a distributed SFT job with the callback alone; started by a launcher, or alone for the one-process run.

Prints one JSON line on rank 0 with what really ran; the state goes to OUTPUT/state.pt.
"""

from __future__ import annotations

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

from structlora_trl import StructLoRACallback
from structlora_trl.core.graph import DepthGraph
from tests.support.jobs import StopAt, sft
from tests.support.setups import loaded
from tests.support.tiny import base_model, standing

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
    "lora": {},  # more LoraConfig options
    "vera": None,  # VeraConfig options: VeRA instead of LoRA
    "freeze": None,  # parameters whose name holds this
    "trainer": {},  # more training arguments
    "deepspeed": {},  # merged into the DeepSpeed config
    "sequence_parallel": 1,  # ranks that share a row, under DeepSpeed
    "resume": None,  # a checkpoint
    "stop_at": None,  # a step
    "again": None,  # call `train` a second time: "same" engine, or "anew"
    "never_average": False,  # keep Trainer from averaging a replicated adapter
    "method_of_rank_1": {},  # options that this rank alone has
    "poison_at": None,  # step at which the loss is NaN
    "kill_at": None,  # step that rank 1 does not survive
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


class KillAt(TrainerCallback):
    """Kill this process outright."""

    def __init__(self, step):
        self.at = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def parallelism(args, world: int) -> dict:
    """Training arguments that put the engine on."""
    batch = args.micro_batch // world
    if args.engine.startswith("zero") or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        from transformers.integrations import HfDeepSpeedConfig  # noqa: F401  (imported before the config is built)

        options = deepspeed_config(args)
        if args.sequence_parallel > 1:
            from accelerate.utils import DeepSpeedSequenceParallelConfig  # from accelerate 1.12 on

            handler = DeepSpeedSequenceParallelConfig(sp_attn_implementation="sdpa")
            sizes = {"sp_size": args.sequence_parallel, "sp_handler": handler}
            options["parallelism_config"] = ParallelismConfig(**sizes)
        return {**options, "per_device_train_batch_size": batch * args.sequence_parallel}
    if args.group_timeout:
        dist.init_process_group(BACKEND, timeout=datetime.timedelta(seconds=args.group_timeout))
    if args.engine in MESHES:
        if not ON_GPU:
            offer_fsdp2_on_cpu()
        options = {
            "use_cpu": False,
            "fsdp": True,
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        }
        mesh = MESHES[args.engine](world)
        if mesh:
            options["parallelism_config"] = ParallelismConfig(**mesh)
        if "cp_size" in mesh and not ON_GPU:
            from tests.support.ring_on_cpu import offer_ring_attention_on_cpu

            offer_ring_attention_on_cpu()
        sharers = mesh.get("cp_size", 1)  # of one row
        return {**options, "per_device_train_batch_size": args.micro_batch * sharers // world}
    options = {"per_device_train_batch_size": batch}
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        offer_fsdp2_on_cpu()
        options["use_cpu"] = False
    return options


def main():
    args = arguments()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    callback = None
    if args.method is not None:
        of_rank = args.method_of_rank_1 if rank == 1 else {}
        callback = StructLoRACallback({"gates": "off", **args.method, **of_rank})
    callbacks = [
        callback,
        args.stop_at is not None and StopAt(args.stop_at),
        args.poison_at is not None and PoisonAt(args.poison_at),
        args.kill_at is not None and rank == 1 and KillAt(args.kill_at),
    ]
    options = {
        **parallelism(args, world),
        "gradient_accumulation_steps": args.accumulation,
        "max_steps": args.steps,
        "bf16": args.dtype == "bfloat16",
        "fp16": args.dtype == "float16",
        "optim": "adamw_torch",
        "logging_steps": 1,
        **args.trainer,
    }
    base = base_model(args.family)
    if args.engine in LOADED:
        from transformers.distributed import DistributedConfig

        base = loaded(base, distributed_config=DistributedConfig(**LOADED[args.engine](world)))
    trainer = sft(
        args.output,
        [c for c in callbacks if c],
        model=base,
        row_count=args.rows,
        lora=args.lora,
        vera=args.vera,
        **options,
    )
    if args.never_average:
        trainer._sync_replicated_trainable_parameters = lambda model: None
    for name, parameter in trainer.model.named_parameters():
        if args.freeze is not None and args.freeze in name:
            parameter.requires_grad_(False)
    trainer.train(resume_from_checkpoint=args.resume)
    if args.again is not None:
        if args.again == "anew":
            trainer.model_wrapped, trainer.optimizer = trainer.model, None
        trainer.train()

    facts = facts_of(trainer, args, callback)
    trainer.save_model(str(args.output / "adapter"))
    if dist.is_initialized():
        dist.barrier()
    if callback is not None:
        stands = zip(callback.runtime.kinds, standing(callback.runtime), strict=True)
        state = {f"{kind.name}/{side}": x for kind, pair in stands for side, x in pair._asdict().items()}
        if rank == 0:
            torch.save(state | (callback._finished or {}), args.output / "state.pt")
    if rank == 0:
        print("FACTS " + json.dumps(facts), flush=True)
    if dist.is_initialized():
        dist.barrier()
        # All is done and written. Tearing down gloo's threads beside DeepSpeed's now and then aborts the interpreter
        # ("terminate called without an active exception"), so leave without; errors never get here.
        os._exit(0)


def facts_of(trainer, args, callback) -> dict:
    """What really ran."""
    wrapped, log = trainer.model_wrapped, trainer.state.log_history
    is_deepspeed = type(wrapped).__name__ == "DeepSpeedEngine"
    facts = {
        "wrapped": type(wrapped).__name__,
        "trains": 1 if args.again is None else 2,
        "world": dist.get_world_size() if dist.is_initialized() else 1,
        "device": trainer.args.device.type,
        "backend": dist.get_backend() if dist.is_initialized() else None,
        "stage": wrapped.zero_optimization_stage() if is_deepspeed else None,
        "optimizer": type(wrapped.optimizer).__name__ if is_deepspeed else None,
        "offload": bool(is_deepspeed and wrapped.zero_cpu_offload()),
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "norms": [float(entry["grad_norm"]) for entry in log if "grad_norm" in entry],
    }
    if callback is not None:
        runtime = callback.runtime
        facts |= {"engine": runtime.engine.name, "step": runtime.step, "skipped": runtime.skipped_steps}
        if args.engine in LOADED:
            facts["base"] = [str(p) for p in trainer.model.get_input_embeddings().weight.placements]
            facts["adapter"] = sorted({type(p.data).__name__ for p in runtime.lora_parameters()})
        if args.engine in MESHES:
            mesh = runtime.kinds[0].B[0].device_mesh
            facts["mesh"] = dict(zip(mesh.mesh_dim_names or ["all"], mesh.shape, strict=True))
    return facts


if __name__ == "__main__":
    main()
