"""What StructLoRA adds to a step where ranks share the parameters: an analytical model. `distributed.py` holds it to counts.

The map wants whole factors, of each kind the side on the residual stream: gradients and latent values before the optimizer's
update, latent values after it, and running means of gradients where edges are drawn anew. Each is a sum over ranks of parts that
do not overlap. Without a coordinator nothing is gathered. The gradients of gates are reduced everywhere, and under ZeRO-1 and 2
DeepSpeed is told to look for NaN, which reduces one byte more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from structlora_trl.core.graph import DepthGraph

FP32 = 4  # bytes
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
GATHERS = 3 + 1 / DepthGraph.redraw_every  # of each side in a step


class Adapter(NamedTuple):
    """LoRA on `kinds` linear modules of each layer; `width` is that of the residual stream."""

    layers: int
    kinds: int
    rank: int
    width: int

    @property
    def modules(self) -> int:
        return self.layers * self.kinds

    @property
    def mapped_bytes(self) -> int:
        return FP32 * self.modules * self.rank * self.width


SMOLLM2 = Adapter(30, 2, 8, 576)
LLAMA_70B = Adapter(80, 7, 16, 8192)


def added(adapter: Adapter, method: str, engine: str, ranks: int) -> dict[str, float]:
    """Return the collectives of a step, and the bytes that leave a rank in rings, on average between two draws of the edges."""
    collectives, reduced = 1, FP32 * adapter.modules * (adapter.rank + 1)  # gates
    collectives += engine in ("zero1", "zero2")  # DeepSpeed looks for NaN
    if method == "structlora" and engine != "ddp":
        flags = engine == "fsdp2"  # which ranks agree on; DeepSpeed has looked at the gradients itself
        collectives += flags + GATHERS * adapter.kinds
        reduced += 2 * FP32 * flags + GATHERS * adapter.mapped_bytes
    return {"collectives": collectives, "bytes_sent": 2 * (ranks - 1) / ranks * reduced}


def disagreements(engine: str, ranks: int, counts: dict[str, dict[str, float]]) -> Iterator[str]:
    """Yield where counts of `distributed.py`, by method, are not what is predicted."""
    for method, found in counts.items():
        for figure, predicted in added(SMOLLM2, method, engine, ranks).items():
            if abs(found[figure] - predicted) > 1e-3 * predicted:
                cell = f"{engine}, {ranks} processes, {method}"
                yield f"{cell}: {figure} is {found[figure]}, predicted is {predicted}"


# --- a large model -------------------------------------------------------------------------------------------------

# NVIDIA's data sheet of the H100 SXM; one 400 Gb/s link per GPU between nodes; what is usual for the rest.
FLOPS, UTILISATION = 989e12, 0.4
MEMORY_BANDWIDTH, LINK_BANDWIDTH = 3.35e12, 50e9  # bytes per second
HOP_SECONDS, LAUNCH_SECONDS = 5e-6, 5e-6  # of a message between two GPUs, of an operation on one
TOKENS_PER_GPU = 8192  # per optimizer step
PARAMETERS = 70.6e9
# What `distributed.py` counts under FSDP2: bytes that the map reads and writes, in those of the whole factors that are mapped; its
# operations for each of their sides; and those of a gate, in one forward and its backward.
PASSES, OPERATIONS, OF_GATE = 64, 63, 14


def estimate(method: str, engine: str, gpus: int) -> dict[str, float]:
    """Return what a step of LLaMA-70B with LoRA on all linear layers adds on a GPU. Nothing is assumed to overlap, and
    all-gathers are rings.
    """
    found, is_mapped = added(LLAMA_70B, method, engine, gpus), method == "structlora"
    sending = found["bytes_sent"] / LINK_BANDWIDTH + found["collectives"] * (gpus - 1) * HOP_SECONDS
    traffic = PASSES * LLAMA_70B.mapped_bytes * is_mapped
    operations = OPERATIONS * LLAMA_70B.kinds * is_mapped + OF_GATE * LLAMA_70B.modules
    on_gpu = traffic / MEMORY_BANDWIDTH + operations * LAUNCH_SECONDS
    # Forward, and gradients of activations: 2 floating-point operations each for every weight and token.
    step = 4 * PARAMETERS * TOKENS_PER_GPU / (FLOPS * UTILISATION)
    return {
        "sent_MB": round(found["bytes_sent"] / 1e6, 1),
        "sending_ms": round(1000 * sending, 2),
        "on_gpu_ms": round(1000 * on_gpu, 2),
        "step_time_ratio": round(1 + (sending + on_gpu) / step, 4),
    }


def estimates(methods: tuple[str, ...]) -> dict[str, dict[str, float]]:
    return {
        f"LLaMA-70B, 7 targets, r=16, {engine}, {gpus} GPUs, {method}": estimate(method, engine, gpus)
        for engine in ("fsdp2", "zero3")
        for gpus in (8, 64, 1024)
        for method in methods
    }
