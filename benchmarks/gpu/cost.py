"""Step time and peak memory on large shapes, as tests whose figures `python -m benchmarks.gpu` writes down.

Weights are random. Methods run one after the other, each from an empty device.
"""

from __future__ import annotations

import gc
import os
import statistics
import traceback

import pytest
import torch

from benchmarks.cost.overhead import (
    METHODS,
    SIZES,
    TARGETS,
    Clock,
    Workload,
    milliseconds,
    quartiles,
    started,
)

pytestmark = pytest.mark.cuda
DEVICE = torch.device(os.environ["STRUCTLORA_DEVICE"])
TINY_SHAPE, TINY_TOKENS = dict(zip(SIZES, (64, 128, 4, 4, 2, 256), strict=True)), 32
SHAPES, TOKENS = {"tiny": TINY_SHAPE}, TINY_TOKENS
if DEVICE.type == "cuda":  # LLaMA 3.2 1B and LLaMA 3.1 8B
    SHAPES, TOKENS = (
        {
            "1B": dict(zip(SIZES, (2048, 8192, 16, 32, 8, 128256), strict=True))
            | {"tie_word_embeddings": True},
            "8B": dict(zip(SIZES, (4096, 14336, 32, 32, 8, 128256), strict=True)),
        },
        2048,
    )
# Weights, the activations of one sequence without checkpointing, and logits in fp32.
LEAST_GB = {"tiny": 0, "1B": 16, "8B": 60}
STEPS = 20
QUICK = ("lora", "structlora")
of_lora = {}


@pytest.fixture(scope="module", autouse=True)
def _warm():
    """What a process loads and keeps once would count as the first method's."""
    started("lora", Clock(DEVICE), Workload(TARGETS["q+v"], 1, TINY_TOKENS, TINY_SHAPE, torch.bfloat16))


@pytest.fixture(autouse=True)
def _empty():
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize(
    "method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_step(shape, targets, method, record_property):
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if DEVICE.type == "cuda" else 0
    if memory < LEAST_GB[shape]:
        pytest.skip(f"needs {LEAST_GB[shape]} GB of GPU memory; this GPU has {memory:.0f}")
    workload = Workload(TARGETS[targets], 1, TOKENS, SHAPES[shape], torch.bfloat16)
    try:
        figures = measure(method, workload)
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # with which pytest would keep the model
        raise
    if method == "lora":
        of_lora[shape, targets] = figures
    if base := of_lora.get((shape, targets)):
        figures |= {f"{name} / LoRA's": figures[name] / base[name] for name in ("step ms", "peak GB")}
    for name, value in figures.items():
        record_property(name, value)


def measure(method: str, workload: Workload) -> dict:
    """Return the median step, and the peak of the allocator from an empty device to the end of the first steps."""
    trainee, peak = started(method, Clock(DEVICE), workload)
    totals, added = zip(*(trainee.step() for _ in range(STEPS)), strict=True)
    step, (low, high) = statistics.median(totals), quartiles(totals)
    figures = {
        "step ms": milliseconds(step),
        "quartiles ms": f"{1000 * low:.1f} to {1000 * high:.1f}",
        "peak GB": peak / 1e9,
        "trained parameters": sum(p.numel() for p in trainee.parameters),
    }
    if trainee.runtime is not None:
        assert trainee.runtime.skipped_steps == 0, "a step of finite gradients was skipped"
        figures["added ms"] = milliseconds(statistics.median(added))
    return figures
