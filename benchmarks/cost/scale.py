"""What StructLoRA adds to a step where ranks share the parameters: an analytical model. `distributed.py` holds it to counts.

The map wants whole factors, one side of a kind at a time: gradients and latent values before the optimizer's update, latent
values after it, and running means of gradients where edges are drawn anew. Each is a sum over ranks of parts that do not overlap.
Who owns what decides how much a rank holds of offsets and running means:

    FSDP2           rows of each factor: of a lora_A, as many ranks as it has rows have one at most
    ZeRO-3          an equal share of each factor
    ZeRO-1, 2       an equal share of all factors in a row: whole layers' where ranks are few, pieces of factors where they are many

Without a coordinator nothing is gathered. The gradients of gates are reduced everywhere, and under ZeRO-1 and 2 DeepSpeed is told
to look for NaN, which reduces one byte more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch

from structlora_trl import StructLoRAConfig
from structlora_trl.core.graph import DepthGraph
from structlora_trl.core.mapping import compared_sides, coordinated_sides

from .overhead import LLAMA_70B, OURS, SMOLLM2_STACK, Stack, build_kind

BF16, FP32 = 2, 4  # bytes
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
GATHERS = 3 + 1 / DepthGraph.redraw_every  # of each side in a step


@dataclass(frozen=True)
class Side:
    """One factor of a kind, at all depths; `start` is where it lies among the numbers of a layer."""

    rows: int
    columns: int
    start: int
    is_mapped: bool
    keeps_origin: bool

    @property
    def size(self) -> int:
        return self.rows * self.columns


def sides_of(stack: Stack, method: str) -> Iterator[Side]:
    """Of all kinds in the order of a layer, under a method of `overhead.OURS`."""
    config, start = StructLoRAConfig(**OURS[method]), 0
    for name, (width_in, width_out) in stack.widths.items():
        kind = build_kind(Stack(stack.name, 2, 1, {name: (1, 1)}), name, torch.device("cpu"))
        mapped, compared = coordinated_sides(kind, config), compared_sides(kind, config)
        for side, shape in {"A": (stack.rank, width_in), "B": (width_out, stack.rank)}.items():
            yield Side(*shape, start, side in mapped, side == "A" and side in compared)
            start += shape[0] * shape[1]


def layer_size(stack: Stack) -> int:
    return sum(stack.rank * sum(widths) for widths in stack.widths.values())


def longest(stack: Stack, side: Side, engine: str, ranks: int) -> int:
    """Numbers of a side that the rank which has most of it holds."""
    if engine == "ddp":
        return stack.depths * side.size
    if engine == "fsdp2":
        return stack.depths * ceil(side.rows / ranks) * side.columns
    if engine == "zero3":
        return stack.depths * ceil(side.size / ranks)
    share = 2 * ceil(stack.depths * layer_size(stack) / (2 * ranks))  # DeepSpeed aligns to two numbers
    of_rank = share * torch.arange(ranks)[:, None]
    of_depth = layer_size(stack) * torch.arange(stack.depths) + side.start
    common = (of_depth + side.size).minimum(of_rank + share) - of_depth.maximum(of_rank)
    return int(common.clamp(min=0).sum(1).max())


@dataclass(frozen=True)
class Added:
    """What StructLoRA adds on the rank that has most.

    Args:
        collectives, bytes_sent (`float`): in an optimizer step, on average.
        held_bytes (`int`): between two steps.
        gathered_bytes (`int`): of the largest side, whole, for as long as it is mapped.
    """

    collectives: float
    bytes_sent: float
    held_bytes: int
    gathered_bytes: int


def added(stack: Stack, method: str, engine: str, ranks: int) -> Added:
    """The means of the rings that `distributed.py` counts: a reduced byte leaves a rank 2(n - 1)/n times."""
    sides = list(sides_of(stack, method))
    mapped, ring = [side for side in sides if side.is_mapped], 2 * (ranks - 1) / ranks
    parts = [longest(stack, side, engine, ranks) for side in mapped]
    modules = len(stack.widths) * stack.depths
    collectives, sent = 1, ring * FP32 * modules * (stack.rank + 1)  # gates
    collectives += engine in ("zero1", "zero2")  # DeepSpeed looks for NaN
    if mapped and engine != "ddp":
        flags = engine == "fsdp2"  # which ranks agree on; DeepSpeed has looked at the gradients itself
        collectives += flags + GATHERS * len(mapped)
        whole = stack.depths * sum(side.size for side in mapped)
        sent += ring * FP32 * (2 * flags + GATHERS * whole)
    starts = 1 if mapped else stack.depths  # of all depths together, or of each
    origins = starts * sum(side.size for side in sides if side.keeps_origin)
    theta = 3 * StructLoRAConfig(**OURS[method]).coordinator_layers * stack.rank**2 + 1  # and its AdamW
    # A graph is two times L x L of bool and one of fp32, and degrees.
    graphs = len(stack.widths) * ((2 + FP32) * stack.depths**2 + FP32 * stack.depths)
    numbers = 2 * sum(parts) + origins + theta * len(mapped) + modules * stack.rank
    gathered = 0 if engine == "ddp" else FP32 * stack.depths * max((side.size for side in mapped), default=0)
    return Added(collectives, sent, FP32 * numbers + graphs, gathered)


# --- a large model -------------------------------------------------------------------------------------------------

# NVIDIA's data sheet of the H100 SXM; one 400 Gb/s link per GPU between nodes; what is usual for the rest.
FLOPS, UTILISATION = 989e12, 0.4
MEMORY_BANDWIDTH, LINK_BANDWIDTH = 3.35e12, 50e9  # bytes per second
HOP_SECONDS, LAUNCH_SECONDS = 5e-6, 5e-6  # of a message between two GPUs, of an operation on one
TOKENS_PER_GPU = 8192  # per optimizer step
PARAMETERS, HIDDEN, INTERMEDIATE = 70.6e9, 8192, 28672
# What `distributed.py` counts under FSDP2: bytes that the map reads and writes, in those of the whole factors that are mapped; its
# operations for each of their sides; and those of a gate, in one forward and its backward.
PASSES, OPERATIONS, OF_GATE = 64, 63, 14


def estimate(stack: Stack, method: str, engine: str, gpus: int) -> dict[str, float]:
    """LLaMA-70B with LoRA on all linear layers, bf16: what a step adds on a GPU beside one of LoRA. Nothing is assumed to overlap;
    all-gathers are rings.
    """
    found, mapped = added(stack, method, engine, gpus), [s for s in sides_of(stack, method) if s.is_mapped]
    sending = found.bytes_sent / LINK_BANDWIDTH + found.collectives * (gpus - 1) * HOP_SECONDS
    traffic = PASSES * FP32 * stack.depths * sum(side.size for side in mapped)
    operations = OPERATIONS * len(mapped) + OF_GATE * len(stack.widths) * stack.depths
    on_gpu = traffic / MEMORY_BANDWIDTH + operations * LAUNCH_SECONDS
    # Forward, and gradients of activations: 2 floating-point operations each for every weight and token.
    step = 4 * PARAMETERS * TOKENS_PER_GPU / (FLOPS * UTILISATION)
    return {
        "sent_MB": round(found.bytes_sent / 1e6, 1),
        "sending_ms": round(1000 * sending, 2),
        "on_gpu_ms": round(1000 * on_gpu, 2),
        "step_time_ratio": round(1 + (sending + on_gpu) / step, 4),
        "held_MB": round(found.held_bytes / 1e6, 1),
        "gathered_MB": round(found.gathered_bytes / 1e6, 1),
        "memory_ratio": round(1 + found.held_bytes / lora_bytes(stack, engine, gpus), 4),
    }


def estimates() -> dict[str, dict[str, float]]:
    return {
        f"{LLAMA_70B.name}, {len(LLAMA_70B.widths)} targets, r={LLAMA_70B.rank}, {engine}, {gpus} GPUs, {method}": estimate(
            LLAMA_70B, method, engine, gpus
        )
        for engine in ("fsdp2", "zero3")
        for gpus in (8, 64, 1024)
        for method in OURS
    }


def lora_bytes(stack: Stack, engine: str, gpus: int) -> float:
    """Peak bytes of plain LoRA on a GPU, in the backward pass: the bf16 base in shards and two gathered layers (one in use, one
    prefetched), LoRA's fp32 values, gradients and two moments, one checkpoint per layer and the activations of one layer. Logits
    and buffers are left out: they would make the share of StructLoRA smaller.
    """
    base = BF16 * PARAMETERS
    working = BF16 if engine == "zero3" else 0  # ZeRO-3 has masters beside the working weights
    lora = (4 * FP32 + working) * stack.depths * layer_size(stack)
    activations = BF16 * (stack.depths * HIDDEN + 8 * HIDDEN + 3 * INTERMEDIATE) * TOKENS_PER_GPU
    return (base + lora) / gpus + 2 * base / stack.depths + activations


def disagreements(engine: str, ranks: int, counts: dict[str, dict[str, float]]) -> Iterator[str]:
    """Where counts of `distributed.py`, by method, are not what is predicted."""
    for method, found in counts.items():
        predicted = added(SMOLLM2_STACK, method, engine, ranks)
        for figure in ("collectives", "bytes_sent", "held_bytes"):
            if abs(found[figure] - getattr(predicted, figure)) > 1e-3 * getattr(predicted, figure):
                expected = getattr(predicted, figure)
                yield f"{engine}, {ranks} processes, {method}: {figure} is {found[figure]}, predicted is {expected}"
