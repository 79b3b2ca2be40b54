"""One rank of a distributed SFT job with the callback alone; started by torchrun, or alone for the one-process run.

Prints one JSON line on rank 0 with what really ran; the state goes to OUTPUT/state.pt.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")

import torch
import torch.distributed as dist
from transformers import TrainerCallback

torch.set_num_threads(1)

CONFIGS = Path(__file__).parent.parent / "configs" / "deepspeed"
MICRO_BATCH = 6  # over all ranks, so that 1, 2 and 3 see the same


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--engine", choices=["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"], default="single")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--method", type=json.loads, default={}, help="StructLoRA options, or null for plain LoRA")
    parser.add_argument("--deepspeed", type=json.loads, default={}, help="merged into the DeepSpeed config")
    parser.add_argument("--trainer", type=json.loads, default={}, help="more training arguments")
    parser.add_argument("--resume", default=None)
    parser.add_argument("--stop-at", type=int, default=None)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--seed-of-rank-1", type=int, default=None)
    parser.add_argument("--poison-at", type=int, default=None, help="step at which the loss is NaN")
    return parser.parse_args()


def deepspeed_config(args) -> dict:
    import deepspeed

    # The shared-memory collectives take a minute to compile and are only faster.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    config = json.loads((CONFIGS / f"{args.engine}.json").read_text())
    for key, value in args.deepspeed.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) and key in config else value
    return config


def offer_fsdp2_on_cpu() -> dict:
    """Accelerate offers FSDP2 on accelerators alone, and would run DDP in silence; on CPU the sharding is the same."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    import accelerate.state
    from accelerate.utils import DistributedType

    accelerate.state.PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    return {
        "use_cpu": False,
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    }


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


def main():
    args = arguments()
    world = int(os.environ.get("WORLD_SIZE", 1))
    options = {
        "per_device_train_batch_size": MICRO_BATCH // world,
        "gradient_accumulation_steps": args.accumulation,
        "max_steps": args.steps,
        "bf16": args.dtype == "bfloat16",
        "optim": "adamw_torch",
        "logging_steps": 1,
        **args.trainer,
    }
    if args.engine.startswith("zero"):
        from transformers.integrations import HfDeepSpeedConfig  # noqa: F401  (imported before the config is built)

        options["deepspeed"] = deepspeed_config(args)

    if args.engine == "fsdp2":
        options |= offer_fsdp2_on_cpu()

    from jobs import sft
    from test_trainers import StopAt

    from structlora_trl import StructLoRACallback

    callback = StructLoRACallback(args.method) if args.method is not None else None
    stop = StopAt(args.stop_at) if args.stop_at is not None else None
    poison = PoisonAt(args.poison_at) if args.poison_at is not None else None
    callbacks = [c for c in (callback, stop, poison) if c]
    if args.seed_of_rank_1 is not None and os.environ.get("RANK") == "1":
        callback.config.seed = args.seed_of_rank_1
    trainer = sft(args.output, callbacks, row_count=args.rows, **options)
    trainer.train(resume_from_checkpoint=args.resume)

    wrapped = trainer.model_wrapped
    facts = {
        "wrapped": type(wrapped).__name__,
        "world": dist.get_world_size() if dist.is_initialized() else 1,
        "stage": wrapped.zero_optimization_stage() if args.engine.startswith("zero") else None,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    if callback is not None:
        runtime = callback.runtime
        facts |= {"engine": runtime.engine.name, "step": runtime.step, "skipped": runtime.skipped_steps}
        if args.engine.startswith(("zero", "fsdp")):
            facts["collectives"] = runtime.engine.packing.collectives
    trainer.save_model(str(args.output / "adapter"))
    if dist.is_initialized():
        dist.barrier()
    if int(os.environ.get("RANK", 0)) == 0:
        if callback is not None:
            torch.save(runtime.state_dict(), args.output / "state.pt")
        print("FACTS " + json.dumps(facts), flush=True)
    if dist.is_initialized():
        dist.barrier()
        # All is done and written. Tearing down gloo's threads beside DeepSpeed's now and then aborts the interpreter
        # ("terminate called without an active exception"), so leave without; errors never get here.
        os._exit(0)


if __name__ == "__main__":
    main()
