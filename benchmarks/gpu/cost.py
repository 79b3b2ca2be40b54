"""Step time and peak memory on large shapes; run by `python -m benchmarks.gpu`, in a process of its own.

Weights are random. Methods run one after the other, each from an empty device, for an equal share of the time.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import traceback
from dataclasses import replace

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

from . import rows
from .machine import GB

QUICK_METHODS = ("lora", "structlora")
SHAPES = {  # LLaMA 3.2 1B and LLaMA 3.1 8B
    "1B": dict(zip(SIZES, (2048, 8192, 16, 32, 8, 128256), strict=True)) | {"tie_word_embeddings": True},
    "8B": dict(zip(SIZES, (4096, 14336, 32, 32, 8, 128256), strict=True)),
}
TINY_SHAPE = dict(zip(SIZES, (64, 128, 4, 4, 2, 256), strict=True))
TOKENS, TINY_TOKENS = 2048, 32
# Weights, the activations of one sequence without checkpointing, and logits in fp32.
LEAST_GB = {"1B": 16, "8B": 60}
LEAST_STEPS, MOST_STEPS, QUICK_STEPS = 3, 30, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    deadline = time.perf_counter() + arguments.seconds
    on_gpu, device = arguments.device == "cuda", torch.device(arguments.device)
    shapes, tokens = (SHAPES, TOKENS) if on_gpu else ({"tiny": TINY_SHAPE}, TINY_TOKENS)
    methods, most = (QUICK_METHODS, QUICK_STEPS) if arguments.quick else (METHODS, MOST_STEPS)
    cells = [(shape, targets, method) for shape in shapes for targets in TARGETS for method in methods]
    rows.plan([", ".join(cell) for cell in cells])

    # What a process loads and keeps once would count as the first method's.
    measure("lora", Workload(TARGETS["q+v"], 1, TINY_TOKENS, TINY_SHAPE, torch.bfloat16), device, 0, 1)
    empty(device)

    of_lora = {}
    for done, (shape, targets, method) in enumerate(cells):
        workload = Workload(TARGETS[targets], 1, tokens, shapes[shape], torch.bfloat16)
        seconds = (deadline - time.perf_counter()) / (len(cells) - done)
        row = measured(", ".join(cells[done]), shape, method, workload, device, seconds, most)
        if method == "lora":
            of_lora = row.figures
        if row.figures and of_lora:
            row = replace(row, figures={**row.figures, **relative(row.figures, of_lora)})
        rows.add(row)


def measured(
    name: str, shape: str, method: str, workload: Workload, device: torch.device, *limits
) -> rows.Row:
    """A row of one method; one that fails leaves the device to the next."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / GB
        if memory < LEAST_GB[shape]:
            reason = f"needs {LEAST_GB[shape]} GB of GPU memory; this GPU has {memory:.0f}"
            return rows.Row(name, rows.SKIPPED, reason)
    print(name, flush=True)
    begun = time.perf_counter()
    try:
        figures, outcome, reason = measure(method, workload, device, *limits), rows.PASSED, ""
    except Exception:
        figures, outcome, reason = {}, rows.FAILED, traceback.format_exc()[-rows.REASON_LENGTH :]
    empty(device)
    return rows.Row(name, outcome, reason, time.perf_counter() - begun, figures)


def empty(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(method: str, workload: Workload, device: torch.device, seconds: float, most: int) -> dict:
    """Median step of one method, and the peak of the allocator from an empty device to the end of its first steps."""
    deadline = time.perf_counter() + seconds
    trainee, peak = started(method, Clock(device), workload)
    steps = []
    while len(steps) < most and (len(steps) < LEAST_STEPS or time.perf_counter() < deadline):
        steps.append(trainee.step())
    totals, added = zip(*steps, strict=True)
    figures = {
        "steps": len(steps),
        "step ms": milliseconds(statistics.median(totals)),
        "quartiles ms": [round(1000 * q, 3) for q in quartiles(list(totals))],
        "peak GB": round(peak / GB, 6),
        "trained parameters": sum(p.numel() for p in trainee.parameters),
    }
    if trainee.runtime is not None:
        assert trainee.runtime.skipped_steps == 0, "a step of finite gradients was skipped"
        figures["added ms"] = milliseconds(statistics.median(added))
        figures["added share"] = round(statistics.median(added) / statistics.median(totals), 4)
    return figures


def relative(figures: dict, of_lora: dict) -> dict:
    return {
        "time to LoRA's": round(figures["step ms"] / of_lora["step ms"], 4),
        "peak to LoRA's": round(figures["peak GB"] / of_lora["peak GB"], 4),
    }


if __name__ == "__main__":
    main()
