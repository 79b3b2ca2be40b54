"""Step time, peak memory and the map's share on large shapes; run by `python -m benchmarks.gpu`, in a process of its own.

Weights are random. Methods run one after the other, each from an empty device, for an equal share of the time.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.cost.overhead import (
    TARGETS,
    Clock,
    Trainee,
    Workload,
    milliseconds,
    peak_allocated_bytes,
    quartiles,
)

from . import rows

METHODS = ("lora", "structlora", "gates", "dora", "adalora")  # `gates` is StructLoRA without its coordinator
QUICK_METHODS = ("lora", "structlora")
_LLAMA_3 = {"vocab_size": 128256, "max_position_embeddings": 8192}
SHAPES = {
    # LLaMA 3.2 1B and LLaMA 3.1 8B
    "1B": {
        **_LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8B": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
TINY_SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS, TINY_TOKENS = 2048, 32
# Weights, the activations of one sequence without checkpointing, and logits in fp32.
LEAST_GB = {"1B": 16, "8B": 60}
WARM_UP, LEAST_STEPS, MOST_STEPS, QUICK_STEPS = 3, 3, 30, 5
PROFILED_OPERATORS = 12
GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    deadline = time.perf_counter() + arguments.seconds
    device = torch.device(arguments.device)
    shapes = SHAPES if arguments.device == "cuda" else {"tiny": TINY_SHAPE}
    tokens = TOKENS if arguments.device == "cuda" else TINY_TOKENS
    methods, most = (QUICK_METHODS, QUICK_STEPS) if arguments.quick else (METHODS, MOST_STEPS)
    cells = [(shape, targets, method) for shape in shapes for targets in TARGETS for method in methods]
    profiles = [(shape, targets) for shape in shapes for targets in TARGETS]
    rows.plan([*(name(*cell) for cell in cells), *(profile_name(*cell) for cell in profiles)])

    # What a process loads and keeps once would count as the first method's.
    measure(
        "lora",
        Workload(TINY_SHAPE, TARGETS["q+v"], 1, TINY_TOKENS, torch.bfloat16),
        device,
        seconds=0,
        most=1,
    )
    empty(device)

    left = len(cells) + len(profiles)
    of_lora = {}
    for shape, targets, method in cells:
        workload = Workload(shapes[shape], TARGETS[targets], 1, tokens, torch.bfloat16)
        seconds = (deadline - time.perf_counter()) / left
        row = guarded(
            name(shape, targets, method), shape, device, measure, method, workload, device, seconds, most
        )
        if method == "lora":
            of_lora[shape, targets] = row.figures
        if row.figures and of_lora[shape, targets]:
            row = replace(row, figures={**row.figures, **relative(row.figures, of_lora[shape, targets])})
        rows.add(row)
        left -= 1
    for shape, targets in profiles:
        workload = Workload(shapes[shape], TARGETS[targets], 1, tokens, torch.bfloat16)
        rows.add(guarded(profile_name(shape, targets), shape, device, profiled, workload, device))


def name(shape: str, targets: str, method: str) -> str:
    return f"{shape}, {targets}, {method}"


def profile_name(shape: str, targets: str) -> str:
    return f"{shape}, {targets}, profile of structlora"


def guarded(what: str, shape: str, device: torch.device, work: Callable[..., dict], *arguments) -> rows.Row:
    """A row of what `work` measures; one that fails leaves the device to the next."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / GB
        if memory < LEAST_GB[shape]:
            return rows.Row(
                what, rows.SKIPPED, f"needs {LEAST_GB[shape]} GB of GPU memory; this GPU has {memory:.0f}"
            )
    print(what, flush=True)
    started = time.perf_counter()
    try:
        figures, outcome, reason = work(*arguments), rows.PASSED, ""
    except Exception:
        figures, outcome, reason = {}, rows.FAILED, traceback.format_exc()[-rows.REASON_LENGTH :]
    empty(device)
    return rows.Row(what, outcome, reason, time.perf_counter() - started, figures)


def empty(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(
    method: str, workload: Workload, device: torch.device, seconds: float, most: int = MOST_STEPS
) -> dict:
    """Median step of one method, and the peak of the allocator from an empty device to the end of its first steps."""
    deadline = time.perf_counter() + seconds
    clock, trainees = Clock(device, cpu_time=False), []

    def start() -> None:
        trainees.append(Trainee(method, device, clock, workload))
        for _ in range(WARM_UP):
            trainees[0].step()

    peak = peak_allocated_bytes(start, device)
    (trainee,) = trainees
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
        figures |= {
            "added ms": milliseconds(statistics.median(added)),
            "added share": round(statistics.median(added) / statistics.median(totals), 4),
            "map ms": round(trainee.runtime.metrics()["structlora/map_ms"], 3),
        }
    return figures


def relative(figures: dict, of_lora: dict) -> dict:
    return {
        "time to LoRA's": round(figures["step ms"] / of_lora["step ms"], 4),
        "peak to LoRA's": round(figures["peak GB"] / of_lora["peak GB"], 4),
    }


def profiled(workload: Workload, device: torch.device) -> dict:
    """What one step of StructLoRA adds to one of LoRA under PyTorch's profiler, all told and by operator.

    Times are those of the kernels that operators launch, on a CPU of the operators themselves.
    """
    found = {}
    for method in QUICK_METHODS:
        trainee = Trainee(method, device, Clock(device, cpu_time=False), workload)
        for _ in range(WARM_UP):
            trainee.step()
        found[method] = by_operator(trainee, device)
        del trainee
        empty(device)
    lora, ours = (found[method] for method in QUICK_METHODS)
    added = {operator: time - lora.get(operator, 0.0) for operator, time in ours.items()}
    largest = sorted(added, key=added.get, reverse=True)[:PROFILED_OPERATORS]
    of_lora, of_ours = sum(lora.values()), sum(ours.values())
    return {
        "kernels": "device" if device.type == "cuda" else "cpu",
        "LoRA ms": round(of_lora, 3),
        "StructLoRA ms": round(of_ours, 3),
        "share of what StructLoRA adds": round((of_ours - of_lora) / of_ours, 4),
        "largest additions, ms": {operator: round(added[operator], 3) for operator in largest},
    }


def by_operator(trainee: Trainee, device: torch.device) -> dict[str, float]:
    """Milliseconds of one step by operator, whichever thread ran it."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        trainee.step()
    # Kernels come by again as events of the device.
    events = [e for e in profiler.key_averages() if e.device_type == DeviceType.CPU]
    return {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1000 for e in events}


if __name__ == "__main__":
    main()
