"""What StructLoRA adds to a step where ranks share the parameters: an analytical model. `distributed.py` holds it to counts.

Who owns what decides what has to travel. The map wants slices of the width, of all depths:

    FSDP2           shards lora_A by rows and lora_B by rows, which are slices of its width: lora_A alone travels
    ZeRO-3          shards each factor flat, by rows again where its rows divide by the ranks
    ZeRO-1, 2       give each rank whole layers, and every rank the whole working weights: both sides travel, and what the map
                    makes of them is gathered

A side travels where the map changes it: three times in a step (gradients in and out, masters in), and where working weights are
sharded once more, when effective values are written. Without a coordinator nothing travels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import ceil, log2

import torch

from structlora_trl import StructLoRAConfig
from structlora_trl.core.mapping import compared_sides, mapped_sides

from .overhead import OURS, SMOLLM2_STACK, STACKS, Stack, build_kind

BF16, FP32, FP64, INT64 = 2, 4, 8, 8  # bytes
AT_ONCE = 2**25  # bytes of whole factors in one all-gather
PERSISTENT = 100_000  # numbers: smaller factors stay whole on every rank of ZeRO-3, by DeepSpeed's default
SHARDED = ("fsdp2", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


@dataclass(frozen=True)
class Side:
    """One factor of a kind, at all depths."""

    name: str
    depths: int
    rank: int
    width: int
    is_moved: bool  # changed by the map
    is_compared: bool  # across depth

    @property
    def numel(self) -> int:
        return self.depths * self.rank * self.width


def sides_of(stack: Stack, method: str) -> Iterator[Side]:
    """Of all kinds, under a method of `overhead.OURS`."""
    config = StructLoRAConfig(**OURS[method])
    for name, widths in stack.widths.items():
        kind = build_kind(Stack(stack.name, 2, 1, {name: (1, 1)}), name, torch.device("cpu"))
        moved, compared = mapped_sides(kind, config), compared_sides(kind, config)
        for side, width in zip("AB", widths, strict=True):
            yield Side(side, stack.depths, stack.rank, width, side in moved, side in compared)


def parameter_count(stack: Stack) -> int:
    return sum(stack.depths * stack.rank * sum(widths) for widths in stack.widths.values())


def row_holders(rank: int, ranks: int) -> int:
    """Ranks that hold rows of a lora_A, as `torch.chunk` deals them: rows are not split, so that r ranks hold all of it."""
    return ceil(rank / ceil(rank / ranks))


@dataclass(frozen=True)
class Communication:
    """What StructLoRA adds to an optimizer step.

    Args:
        exchanges, gathers, reductions (`int`): all-to-alls, all-gathers and all-reduces.
        exchanged_bytes, gathered_bytes (`float`): what a rank sends in them, on average over the ranks.
        busiest_bytes (`float`): what the busiest rank sends, or receives, in all-to-alls.
        reduced_bytes (`int`): what is reduced; of it a rank sends 2(n - 1)/n.
    """

    exchanges: int = 0
    gathers: int = 0
    reductions: int = 0
    exchanged_bytes: float = 0.0
    gathered_bytes: float = 0.0
    busiest_bytes: float = 0.0
    reduced_bytes: int = 0

    @property
    def collectives(self) -> int:
        return self.exchanges + self.gathers + self.reductions

    def sent_bytes(self, ranks: int) -> float:
        """By a rank, on average."""
        return self.exchanged_bytes + self.gathered_bytes + 2 * (ranks - 1) / ranks * self.reduced_bytes


def communication(stack: Stack, method: str, engine: str, ranks: int, working: int = FP32) -> Communication:
    """Of a step that rebuilds no edges, where every width divides by the ranks.

    Args:
        engine (`str`): 'ddp', or one of `SHARDED`.
        working (`int`, *optional*, defaults to 4): bytes of a working weight.
    """
    if engine == "ddp" or ranks == 1:
        return Communication()
    left = (ranks - 1) / ranks  # of what a rank has, the part that others want
    travelling: dict[str, int] = {"A": 0, "B": 0}  # how often each side does
    wholes: list[int] = []  # bytes of the factors that are gathered
    exchanged = busiest = 0
    for side in sides_of(stack, method):
        if not side.is_moved:
            continue
        is_whole = is_whole_in_model(side, engine)
        if is_whole:
            wholes.append(working * side.numel)
        if side.name == "B" and not engine.startswith(("zero1", "zero2")):
            continue
        times = 3 if is_whole else 4
        travelling[side.name] = max(travelling[side.name], times)  # all kinds together
        exchanged += times * left * FP32 * side.numel / ranks
        holders = row_holders(side.rank, ranks) if engine == "fsdp2" else ranks
        busiest += times * left * FP32 * side.numel / holders
    if not any(side.is_moved for side in sides_of(stack, method)):
        return Communication()
    reduced = FP32 * reduced_count(stack, method)
    exchanges, gathered = sum(travelling.values()), left * sum(wholes)
    return Communication(exchanges, lots(wholes), 1, exchanged, gathered, busiest, reduced)


def lots(sizes: list[int]) -> int:
    """All-gathers that factors of these bytes take: as many at once as fit `AT_ONCE`."""
    count = room = 0
    for size in sizes:
        if size > room:
            count, room = count + 1, AT_ONCE
        room -= size
    return count


def is_whole_in_model(side: Side, engine: str) -> bool:
    """Whether every rank's model holds the whole factor."""
    if engine.startswith("zero3"):
        return side.rank * side.width <= PERSISTENT
    return engine.startswith(("zero1", "zero2"))


def reduced_count(stack: Stack, method: str) -> int:
    """Numbers of the all-reduce: gradients of Θ, two flags of gradients (NaN, and all zero), and one of weights that others
    wrote. The first step after a log has some more, which a metric is made of.
    """
    return 3 + theta_count(stack, method)


def theta_count(stack: Stack, method: str) -> int:
    config = StructLoRAConfig(**OURS[method])
    moved = (side for side in sides_of(stack, method) if side.is_moved)
    return sum(config.coordinator_layers * side.rank**2 for side in moved)


@dataclass(frozen=True)
class Held:
    """Bytes that StructLoRA keeps on a rank between two steps.

    Args:
        latents (`float`): slices of what is moved, and the latent fragments that FSDP2's step swaps in.
        running_mean (`float`): gradients that semantic edges follow.
        origins (`float`): A₀, of one depth where all start from one.
        places (`float`): where each value that travels goes to and comes from; of one depth where all are owned alike.
        small (`int`): Θ, its AdamW, graphs, checksums of what was written.
        spans (`int`): who owns what, on the host.
    """

    latents: float = 0.0
    running_mean: float = 0.0
    origins: float = 0.0
    places: float = 0.0
    small: int = 0
    spans: int = 0

    @property
    def bytes(self) -> float:
        return self.latents + self.running_mean + self.origins + self.places + self.small + self.spans


def held(stack: Stack, method: str, engine: str, ranks: int) -> Held:
    """By the busiest rank, where every width divides by the ranks."""
    coordinated = StructLoRAConfig(**OURS[method]).coordinator != "none"
    ranks = 1 if engine == "ddp" else ranks
    latents = means = origins = places = 0.0
    mapped = 0  # parameters
    for side in sides_of(stack, method):
        share = side.numel / ranks
        if side.is_compared and side.name == "A":
            origins += share / (side.depths if coordinated else 1)  # one start for all depths
        if not side.is_moved:
            continue
        means += share
        latents += share
        mapped += side.depths
        if engine == "ddp":
            continue
        own = share
        if engine == "fsdp2":
            own = side.numel / (row_holders(side.rank, ranks) if side.name == "A" else ranks)
            latents += own
        places += (own + share) / (side.depths if engine.startswith(("fsdp2", "zero3")) else 1)
    kinds = len(stack.widths)
    graphs = kinds * stack.depths**2 * (FP32 + 2)  # Â in fp32, two kinds of edges in bool
    return Held(
        FP32 * latents,
        FP32 * means,
        FP32 * origins,
        INT64 * places,
        FP32 * 3 * theta_count(stack, method) + graphs + INT64 * mapped,  # Θ with two moments
        0 if engine == "ddp" else 2 * INT64 * ranks * 2 * kinds * stack.depths,
    )


def predicted(stack: Stack, method: str, engine: str, ranks: int) -> dict[str, tuple[float, float]]:
    """Counts of `distributed.py`, each with the share of it by which it may be off."""
    found = communication(stack, method, engine, ranks)
    # Ranks of ZeRO-1 and 2 own layers, up to one that is torn between two; bytes are whole numbers.
    torn = 0.02 if engine.startswith(("zero1", "zero2")) else 1e-4
    return {
        "collectives": (found.collectives, 0.0),
        "bytes_sent": (found.sent_bytes(ranks), torn),
        "held_bytes": (held(stack, method, engine, ranks).bytes, 0.01 + torn),
    }


# --- a large model -------------------------------------------------------------------------------------------------

# NVIDIA's data sheet of the H100 SXM; one 400 Gb/s link per GPU between nodes; what is usual for the rest.
FLOPS, UTILISATION = 989e12, 0.4
MEMORY_BANDWIDTH, LINK_BANDWIDTH = 3.35e12, 50e9  # bytes per second
HOP_SECONDS = 5e-6  # of a message between two GPUs
MESSAGE_SECONDS = 1e-6  # until a GPU can send its next message, while others are under way
LAUNCH_SECONDS = 5e-6  # of an operation on a GPU
TOKENS_PER_GPU = 8192  # per optimizer step
LLAMA_70B_PARAMETERS, HIDDEN, INTERMEDIATE = 70.6e9, 8192, 28672
MOST_STEP_SHARE, MOST_MEMORY_SHARE = 0.005, 0.01  # of LoRA's own, what we aim at


@dataclass(frozen=True)
class Work:
    """What is done in a step.

    Args:
        passes (`float`): bytes that the map's operations read and write, in the rank's share of the fp32 factors.
        of_kind, of_factor (`float`): operations of the map, for each kind, and for each lora_A and lora_B of a layer.
        of_module (`float`): operations of the gate of a module, in one forward and its backward.
        passing (`float`): how far memory rises within the step, in the rank's share of the fp32 factors.
    """

    passes: float
    of_kind: float
    of_factor: float
    of_module: float
    passing: float


# Where nothing was counted before.
COUNTED = {
    "fsdp2": {"structlora": Work(68.2, 58.5, 0, 3, 4.2), "gates": Work(0.0, 0.0, 0, 3, 0.0)},
    "zero3": {"structlora": Work(73.3, 58.5, 0.65, 3, 4.8), "gates": Work(0.0, 0.0, 0, 3, 0.0)},
}


def work_of(counts: dict[str, dict[str, dict]]) -> dict[str, dict[str, Work]]:
    """From what `distributed.py` counted, by engine and method. Where gates act alone, all that is counted is theirs. FSDP2's
    other operations are of kinds; the other engines have some of each factor beside.
    """
    kinds, modules = len(SMOLLM2_STACK.widths), len(SMOLLM2_STACK.widths) * SMOLLM2_STACK.depths
    if not counts.keys() >= COUNTED.keys():
        return COUNTED
    found: dict[str, dict[str, Work]] = {engine: {} for engine in COUNTED}
    for engine in COUNTED:
        for method, figures in counts[engine].items():
            gates = counts[engine]["gates"]
            of_map = figures["map_operations"] - gates["map_operations"]
            of_kinds = counts["fsdp2"][method]["map_operations"] - counts["fsdp2"]["gates"]["map_operations"]
            found[engine][method] = Work(
                figures["map_passes"] - gates["map_passes"],
                of_kinds / kinds,
                max(0, of_map - of_kinds) / (2 * modules),
                gates["map_operations"] / modules,
                figures["passing_bytes"] / figures["share_bytes"],
            )
    return found


@dataclass(frozen=True)
class Estimate:
    """What one optimizer step of StructLoRA adds on the busiest GPU, beside a step of LoRA. Nothing is assumed to overlap."""

    lora_parameters: int
    sent_bytes: int
    exchange_ms: float
    gather_ms: float
    reduce_ms: float
    map_ms: float  # and gates
    lora_step_ms: float  # arithmetic alone
    step_time_ratio: float
    held_bytes: int
    passing_bytes: int  # in the optimizer step, when activations and gathered layers are gone
    lora_bytes: int
    memory_ratio: float


def estimates(work: dict[str, dict[str, Work]]) -> dict[str, dict]:
    """LLaMA-70B with LoRA on all linear layers, bf16, by engine and method."""
    big = next(stack for stack in STACKS if stack.name == "LLaMA-70B")
    return {
        f"LLaMA-70B, {len(big.widths)} targets, r={rank}, {engine}, {gpus} GPUs, {method}": asdict(
            estimate(
                Stack(big.name, big.depths, rank, big.widths), method, engine, gpus, work[engine][method]
            )
        )
        for rank in (16, 64)
        for gpus in (64, 1024)
        for engine in work
        for method in OURS
    }


def estimate(stack: Stack, method: str, engine: str, gpus: int, work: Work) -> Estimate:
    """All-to-alls: the busiest GPU's bytes over its link, after a hop and a message to each other GPU. All-gathers are rings of
    n - 1 hops, small all-reduces trees of 2 log2 n.
    """
    found, parameters = communication(stack, method, engine, gpus, BF16), parameter_count(stack)
    share = FP32 * parameters / gpus
    exchange = found.busiest_bytes / LINK_BANDWIDTH + found.exchanges * (
        HOP_SECONDS + (gpus - 1) * MESSAGE_SECONDS
    )
    gather = found.gathered_bytes / LINK_BANDWIDTH + found.gathers * (gpus - 1) * HOP_SECONDS
    reduce = 2 * found.reduced_bytes / LINK_BANDWIDTH + found.reductions * 2 * log2(gpus) * HOP_SECONDS
    of_depth = 2 * work.of_factor + work.of_module
    operations = len(stack.widths) * (work.of_kind + stack.depths * of_depth)
    on_gpu = work.passes * share / MEMORY_BANDWIDTH + operations * LAUNCH_SECONDS
    # Forward, and gradients of activations: 2 floating-point operations each for every weight and token.
    step = 4 * LLAMA_70B_PARAMETERS * TOKENS_PER_GPU / (FLOPS * UTILISATION)
    kept = held(stack, method, engine, gpus)
    on_gpus = kept.bytes - kept.spans
    own = lora_bytes(stack, engine, gpus)
    return Estimate(
        lora_parameters=parameters,
        sent_bytes=round(found.sent_bytes(gpus)),
        exchange_ms=round(1000 * exchange, 3),
        gather_ms=round(1000 * gather, 3),
        reduce_ms=round(1000 * reduce, 3),
        map_ms=round(1000 * on_gpu, 3),
        lora_step_ms=round(1000 * step, 1),
        step_time_ratio=round(1 + (exchange + gather + reduce + on_gpu) / step, 5),
        held_bytes=round(on_gpus),
        passing_bytes=round(work.passing * share),
        lora_bytes=round(own),
        memory_ratio=round(1 + on_gpus / own, 5),
    )


def lora_bytes(stack: Stack, engine: str, gpus: int) -> float:
    """Peak bytes of plain LoRA on a GPU, in the backward pass: the bf16 base in shards and two gathered layers (one in use, one
    prefetched), LoRA's fp32 values, gradients and two moments, one checkpoint per layer and the activations of one layer. Logits
    and buffers are left out: they would make the share of StructLoRA smaller.
    """
    base = BF16 * LLAMA_70B_PARAMETERS
    gathered = 2 * base / stack.depths
    working = BF16 if engine == "zero3" else 0  # ZeRO-3 has masters beside the working weights
    lora = (4 * FP32 + working) * parameter_count(stack) / gpus
    checkpoints = BF16 * stack.depths * HIDDEN * TOKENS_PER_GPU
    layer = BF16 * (8 * HIDDEN + 3 * INTERMEDIATE) * TOKENS_PER_GPU
    return base / gpus + gathered + lora + checkpoints + layer
