"""Start `distributed_job.py` in real processes, and make sure that the engine which is meant is really on."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file

from tests.support.device import CHOSEN, ON_GPU
from tests.support.forked import run_forked

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
JOB = Path(__file__).with_name("distributed_job.py")
ENGINES = {
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
}
# HSDP takes four processes or more.
NAMES = {**ENGINES, "hsdp": "HSDP", "cp": "FSDP2", "loaded": "FSDP2 (replicated adapter)"}
# Adam moves an element by its full rate whichever sign rounding gives a gradient of 1e-9; this epsilon takes that out.
STEADY = {"adam_epsilon": 1e-6}
# The loss scale starts at 2^20, where the first steps overflow.
FP16 = {"bf16": {"enabled": False}, "fp16": {"enabled": True, "initial_scale_power": 20, "hysteresis": 1}}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}

one_at_a_time = pytest.mark.xdist_group("distributed")  # a job is several processes


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(world: int, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *("--nproc_per_node", str(world), "--master_port", str(free_port())),
        *more,
    ]


def job_arguments(output, engine: str, options: dict) -> list[str]:
    """The job's command line."""
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    if engine.startswith("loaded_") and Version(transformers.__version__) < Version("5.24"):
        pytest.skip(
            f"Trainer of transformers {transformers.__version__} does not average a replicated adapter"
        )
    return [str(JOB), str(output), engine, json.dumps(options)]


def run(
    command: list[str], timeout: float = 300, cwd=None, **environment: str
) -> subprocess.CompletedProcess:
    variables = {**ENVIRONMENT, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=variables, cwd=cwd)


def said_in_one_rank(what: str):
    """What `one_rank.py` finds."""
    environment = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "LOCAL_RANK": "0"}
    done = run([sys.executable, "-m", "tests.support.one_rank", what], **environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def facts_of(done: subprocess.CompletedProcess, engine: str, world: int) -> dict:
    """What the job says has run, checked."""
    facts = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("FACTS ")]
    assert done.returncode == 0 and facts, (done.stdout + done.stderr)[-4000:]
    assert facts[0]["device"] == (CHOSEN or "cpu")
    if engine != "single":
        name = "loaded" if engine.startswith("loaded_") else engine.removesuffix("_offload")
        wrapped = {
            "ddp": "DistributedDataParallel",
            "loaded": "PeftModel",
            **dict.fromkeys(("fsdp2", "hsdp", "cp"), "FSDPPeftModel"),
        }.get(name, "DeepSpeedEngine")
        stage = int(name[-1]) if name.startswith("zero") else None
        assert (facts[0]["wrapped"], facts[0]["stage"], facts[0]["world"]) == (wrapped, stage, world)
        assert facts[0]["offload"] == engine.endswith("_offload")
        assert facts[0].get("engine") in (None, NAMES[name])
        if "engine" in facts[0]:
            processes = "1 process" if world == 1 else f"{world} processes"
            assert done.stdout.count(f"StructLoRA on {NAMES[name]}, {processes}: ") == facts[0]["trains"]
    return facts[0]


def launch(output, engine: str = "single", world: int = 2, check: bool = True, **options) -> dict | str:
    """Run the job; its facts, or its output where it may fail."""
    job, alone = job_arguments(output, engine, options), engine == "single"
    if ON_GPU:  # which a fork cannot share with its parent; Trainer alone would use all of them
        start = [sys.executable] if alone else torchrun(world)
        done = run(start + job, **({"CUDA_VISIBLE_DEVICES": "0"} if alone else {}))
    else:
        done = run_forked(job, None if alone else world, {**ENVIRONMENT, "MASTER_PORT": str(free_port())})
    return facts_of(done, engine, world) if check else done.stdout + done.stderr


def state(output) -> dict[str, torch.Tensor]:
    return torch.load(output / "state.pt")


def trained(output) -> dict[str, torch.Tensor]:
    """Weights, offsets, Θ and semantic edges at the end."""
    ends = ("/A", "/B", "offset_A", "offset_B", "theta", "graph.semantic")
    return {n: v for n, v in state(output).items() if n.endswith(ends)}


def adapter(output) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def largest_difference(left: dict, right: dict) -> float:
    assert left.keys() == right.keys() and left
    return max((x.float() - right[n].float()).abs().max().item() for n, x in left.items() if x.numel())
