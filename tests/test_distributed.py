"""DDP and DeepSpeed ZeRO 1 to 3 in real processes over gloo: the latents of the one-process run, few collectives, resuming."""

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
from safetensors.torch import load_file

JOB = Path(__file__).with_name("distributed_job.py")
ENGINES = {
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
}
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}

pytestmark = pytest.mark.xdist_group("distributed")  # one job at a time: they are several processes each
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def launch(output, engine: str = "single", world: int = 2, check: bool = True, **options) -> dict | str:
    """Run the job; its facts, or its output where it may fail."""
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable]
    if engine != "single":
        start += ["-m", "torch.distributed.run", "--nproc_per_node", str(world), "--master_port", str(port)]
    arguments = ["--engine", engine]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
    done = subprocess.run(
        [*start, str(JOB), str(output), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(JOB.parent.parent), "TOKENIZERS_PARALLELISM": "false"},
    )
    if not check:
        return done.stdout + done.stderr
    facts = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("FACTS ")]
    assert done.returncode == 0 and facts, (done.stdout + done.stderr)[-4000:]
    if engine != "single":  # the engine that is meant is really on
        wrapped = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModel"}.get(engine, "DeepSpeedEngine")
        stage = int(engine[-1]) if engine.startswith("zero") else None
        assert (facts[0]["wrapped"], facts[0]["stage"], facts[0]["world"]) == (wrapped, stage, world)
        assert facts[0].get("engine") in (None, ENGINES[engine])
    return facts[0]


def trained(output) -> dict[str, torch.Tensor]:
    state = torch.load(output / "state.pt")
    return {n: v for n, v in state.items() if "latent" in n or "logits" in n or "theta" in n}


def largest_difference(left: dict, right: dict) -> float:
    assert left.keys() == right.keys()
    return max((left[name].float() - right[name].float()).abs().max().item() for name in left)


slow = pytest.mark.slow
PARITY = [
    pytest.param("ddp", 2, 1, {}),
    pytest.param("fsdp2", 2, 3, {}),
    pytest.param("zero2", 2, 3, {}),
    pytest.param("zero3", 2, 1, SHARDED),
    pytest.param("ddp", 3, 3, {}, marks=slow),
    pytest.param("fsdp2", 3, 1, {}, marks=slow),
    pytest.param("zero1", 2, 1, {}, marks=slow),
    pytest.param("zero1", 3, 3, {}, marks=slow),
    pytest.param("zero2", 3, 1, {}, marks=slow),
    pytest.param("zero3", 2, 3, {}, marks=slow),
    pytest.param("zero3", 3, 3, SHARDED, marks=slow),
]


@pytest.mark.parametrize("engine, world, accumulation, deepspeed", PARITY)
def test_latents_are_those_of_one_process(engine, world, accumulation, deepspeed, tmp_path):
    # 60 rows are ten micro-batches: with accumulation 3, the last window of an epoch is short.
    # Adam moves an element by its full rate whichever sign rounding gives a gradient of 1e-9; this epsilon takes that out.
    trainer = {"adam_epsilon": 1e-6}
    options = {"accumulation": accumulation, "rows": 48 if accumulation == 1 else 60, "steps": 10, "trainer": trainer}
    launch(tmp_path / "one", **options)
    facts = launch(tmp_path / "many", engine, world, deepspeed=deepspeed, **options)
    assert facts["step"] == 10 and facts["skipped"] == 0
    assert largest_difference(trained(tmp_path / "one"), trained(tmp_path / "many")) <= 1e-5
    if engine != "ddp":
        assert facts["collectives"] == 1 + 2 * facts["step"]  # masters at attach; gradients and masters in each step


@pytest.mark.parametrize(
    "engine", ["ddp", *(pytest.param(e, marks=slow) for e in ("fsdp2", "zero1", "zero2", "zero3"))]
)
def test_off_is_plain_lora_bit_for_bit(engine, tmp_path):
    launch(tmp_path / "plain", engine, method=None, steps=4)
    launch(tmp_path / "off", engine, method={"filter": "none", "coordinator": "none"}, steps=4)
    plain, off = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("plain", "off"))
    assert plain.keys() == off.keys() and all(torch.equal(plain[name], off[name]) for name in plain)


@pytest.mark.parametrize(
    "engine", ["zero3", *(pytest.param(e, marks=slow) for e in ("ddp", "fsdp2", "zero1", "zero2"))]
)
def test_resume_is_bit_for_bit(engine, tmp_path):
    options = {"steps": 6, "trainer": {"save_strategy": "steps", "save_steps": 3}}
    launch(tmp_path / "whole", engine, **options)
    launch(tmp_path / "parts", engine, stop_at=3, **options)
    launch(tmp_path / "parts", engine, resume=str(tmp_path / "parts" / "checkpoint-3"), **options)
    whole, parts = torch.load(tmp_path / "whole" / "state.pt"), torch.load(tmp_path / "parts" / "state.pt")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    adapters = [load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "parts")]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


@pytest.mark.parametrize(
    "engine", ["zero2", *(pytest.param(e, marks=slow) for e in ("ddp", "fsdp2", "zero1", "zero3"))]
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=slow)])
def test_bad_gradients_skip_the_step_everywhere(engine, dtype, tmp_path):
    """The run with a poisoned last step ends where the run without that step does."""
    if engine == "fsdp2" and dtype == "bfloat16":
        pytest.skip("Trainer offers bf16 on CPU with `use_cpu` alone, and FSDP2 without it alone")
    facts = launch(tmp_path / "poisoned", engine, dtype=dtype, steps=4, poison_at=3)
    assert facts["step"] == 3 and facts["skipped"] == 1
    launch(tmp_path / "clean", engine, dtype=dtype, steps=4, stop_at=3)
    assert largest_difference(trained(tmp_path / "poisoned"), trained(tmp_path / "clean")) == 0


def test_ranks_that_differ_stop_with_what_differs(tmp_path):
    output = launch(tmp_path, "ddp", check=False, seed_of_rank_1=99, steps=1)
    for rank in (0, 1):
        assert f"[rank{rank}]: structlora_trl.errors.StructLoRAError" in output
    assert "ranks that differ in configuration, seed" in output and "rank 1 has 99" in output


@slow
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_bf16_is_as_near_to_one_process_as_plain_lora(engine, tmp_path):
    def distance(method) -> float:
        runs = [tmp_path / f"{name}-{method is None}" for name in ("one", "many")]
        launch(runs[0], method=method, dtype="bfloat16", steps=10)
        launch(runs[1], engine, method=method, dtype="bfloat16", steps=10)
        adapters = [load_file(run / "adapter" / "adapter_model.safetensors") for run in runs]
        return largest_difference(*adapters)

    assert distance({}) <= 2 * distance(None)


@needs_deepspeed
@pytest.mark.parametrize(
    "engine, deepspeed, trainer, message",
    [
        pytest.param("zero2", {"zero_optimization": {"stage": 0}}, {}, "DeepSpeed at ZeRO stage 0", marks=slow),
        pytest.param(
            "zero1", {"data_types": {"grad_accum_dtype": "fp32"}}, {"bf16": True}, "BF16_Optimizer", marks=slow
        ),
    ],
)
def test_unserved_set_ups_are_refused_by_name(engine, deepspeed, trainer, message, tmp_path):
    output = launch(tmp_path, engine, check=False, deepspeed=deepspeed, trainer=trainer, steps=1)
    assert f"StructLoRA found {message}" in output.replace("DeepSpeed's ", "")
