"""DDP, FSDP2 and ZeRO 1 to 3 on the GPUs there are, over NCCL (promise 3); on a CPU, 2 processes over gloo."""

from __future__ import annotations

import pytest
import torch

from tests.support.device import BACKEND, ON_GPU
from tests.support.launching import (
    ENGINES,
    FP16,
    STEADY,
    adapter,
    largest_difference,
    launch,
    one_at_a_time,
    trained,
)

pytestmark = [pytest.mark.cuda, one_at_a_time]

STEPS = 10
BATCH = 6  # of the job, over all its processes


def processes() -> int:
    """As many as there are GPUs and as the batch divides by."""
    available = torch.cuda.device_count() if ON_GPU else 2
    return max(count for count in range(1, BATCH + 1) if BATCH % count == 0 and count <= available)


def run(output, engine: str, **options) -> dict:
    facts = launch(output, engine, processes(), **options)
    assert facts["backend"] == BACKEND
    return facts


@pytest.mark.parametrize(
    "engine", [e if e == "zero3" else pytest.param(e, marks=pytest.mark.slow) for e in ENGINES]
)
def test_3_fp32_weights_are_those_of_one_process(engine, device, tmp_path, one_process, record_property):
    if engine == "ddp" and processes() == 1:
        pytest.skip("DDP needs two GPUs")
    options = {"steps": STEPS, "trainer": STEADY}
    facts = run(tmp_path, engine, **options)
    assert (facts["step"], facts["skipped"]) == (STEPS, 0)
    difference = largest_difference(trained(one_process(**options)), trained(tmp_path))
    record_property("processes", facts["world"])
    record_property("backend", facts["backend"])
    record_property("largest difference of weights, gates and Θ", difference)
    assert difference <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_3_bf16_is_as_near_to_one_process_as_plain_lora(
    engine, device, tmp_path, one_process, record_property
):
    if processes() == 1:
        pytest.skip("one process has no other to differ from: needs two GPUs")

    def distance(name, method) -> float:
        options = {"steps": STEPS, "dtype": "bfloat16", "method": method, "trainer": STEADY}
        run(tmp_path / name, engine, **options)
        one, many = adapter(one_process(**options)), adapter(tmp_path / name)
        return sum((one[n] - many[n]).float().square().sum().item() for n in one) ** 0.5

    ours, plain = distance("ours", {}), distance("plain", None)
    record_property("distance of StructLoRA's adapters", ours)
    record_property("distance of plain LoRA's adapters", plain)
    assert ours <= 2 * plain


@pytest.mark.slow
def test_3_fp16_overflow_skips_the_step_for_all(device, tmp_path):
    """DeepSpeed halves its loss scale at each of the first steps, and training goes on."""
    facts = run(tmp_path, "zero2", steps=5, dtype="float16", deepspeed=FP16, trainer=STEADY)
    assert facts["step"] + facts["skipped"] == 5
    assert facts["step"] > 0 and facts["skipped"] > 0
