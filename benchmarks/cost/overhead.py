"""What StructLoRA costs, with and without its coordinator, next to LoRA, DoRA and AdaLoRA; and the map by itself.

    python -m benchmarks.cost.overhead            # all methods on a model of SmolLM2-135M's shape
    python -m benchmarks.cost.overhead --quick    # the same, within 20 minutes
    python -m benchmarks.cost.overhead --map      # the map: LLaMA-7B, LLaMA-70B and up to 1000 depths, on one core

Each prints one JSON line; progress goes to stderr. How it measures:

* Weights are random, since neither time nor memory depends on them: nothing is downloaded. Gates act throughout.
* Query and value are adapted, as in the paper, and then all linear modules, in a short step of 360 tokens; and all linear
  modules in one of 2,048, with LoRA and StructLoRA alone.
* Time: every round takes one step of each method, in an order shuffled anew, and ratios are taken within a round; their
  medians and quartiles are printed. `added_ms` is how long StructLoRA's hooks around the optimizer's update ran.
  It is far less noisy than a difference of whole steps; gates, which are part of the forward, are in whole steps alone.
  `gate_kernels` counts what one gate adds to a forward and to a backward: operators that compute, each a kernel on a GPU.
* Memory: `peak_memory_ratio` compares the peak bytes of torch's allocator from before the model is built to the end of
  the second step: exact and repeatable. `peak_rss_ratio` (Linux, on the CPU, not with `--quick`) compares the peak
  resident sets of fresh processes, which also hold the interpreter and its libraries.
* On a busy machine, `OMP_NUM_THREADS=1` with `--cpu-time` gives steadier figures.
* The map runs on one core, with the allocator as it is: `MALLOC_...` variables are refused. glibc takes large tensors from
  the system anew each time, and `page_faults` counts what that costs (Linux). `linearity` is the exponent e of a fit
  time = c * depths^e: 1 is linear. Bytes are per byte of the LoRA factors: `held` between steps, `passing` at the
  most within a step on top of that, gradients and the model's own weights not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from structlora_trl import Runtime, StructLoRAConfig, attach
from structlora_trl.core.gates import Forward
from structlora_trl.core.graph import DepthGraph
from structlora_trl.core.kinds import Kind
from structlora_trl.core.mapping import mapped_sides
from structlora_trl.engines import TorchEngine
from structlora_trl.gating import Gating
from structlora_trl.runtime import Plan
from structlora_trl.state import State

# name -> options of StructLoRA
OURS = {"structlora": {}, "gates": {"coordinator": "none"}}
EXAMPLES = 1000  # of a run, which set the price of what gates let through: no figure depends on them
METHODS = ("lora", *OURS, "dora", "adalora")
SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
}
TARGETS = {
    "q+v": ["q_proj", "v_proj"],
    "all linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
RANK, ADALORA_INITIAL_RANK = 8, 12
BATCH, TOKENS, LONG_TOKENS = 8, 45, 256
LEARNING_RATE, CLIP = 2e-4, 1.0
WARM_UP, MOST_ROUNDS = 2, 150
SECONDS, QUICK_SECONDS = (
    1500,
    270,
)  # for each set of targets, without the processes that measure resident memory
RSS_REPEATS = 3
BYTES_PER_KB = 1024


@dataclass(frozen=True)
class Workload:
    """What is trained: options of `LlamaConfig`, LoRA's targets, a batch of sequences, the frozen weights' dtype, and how."""

    shape: dict
    targets: list[str]
    batch: int
    tokens: int
    dtype: torch.dtype = torch.float32
    methods: tuple[str, ...] = METHODS


SMOLLM2_WORKLOADS = {
    **{name: Workload(SMOLLM2_135M, targets, BATCH, TOKENS) for name, targets in TARGETS.items()},
    "all linear, 2,048 tokens": Workload(
        SMOLLM2_135M, TARGETS["all linear"], BATCH, LONG_TOKENS, methods=("lora", *OURS)
    ),
}


@dataclass(frozen=True)
class Stack:
    """LoRA factors of one model: `widths` maps a kind's name to its input and output width."""

    name: str
    depths: int
    rank: int
    widths: dict[str, tuple[int, int]]


SMOLLM2_STACK = Stack("SmolLM2-135M", 30, 8, {"q_proj": (576, 576), "v_proj": (576, 192)})
STACKS = (
    SMOLLM2_STACK,
    Stack("LLaMA-7B", 32, 8, {"q_proj": (4096, 4096), "v_proj": (4096, 4096)}),
    Stack(
        "LLaMA-70B",
        80,
        16,
        {
            "q_proj": (8192, 8192),
            "k_proj": (8192, 1024),
            "v_proj": (8192, 1024),
            "o_proj": (8192, 8192),
            "gate_proj": (8192, 28672),
            "up_proj": (8192, 28672),
            "down_proj": (28672, 8192),
        },
    ),
    *(
        Stack(f"{n} depths", n, 8, {"q_proj": (4096, 4096), "v_proj": (4096, 4096)})
        for n in (125, 250, 500, 1000)
    ),
)
MAP_WARM_UP, MAP_STEPS, REBUILDS = 2, 7, 3
NEVER = 10**9  # steps between rebuilds of the semantic edges
# Norm that all depths' gradients share, to that of each one's own: semantic edges are drawn.
SHARED_GRADIENT = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="end within 20 minutes")
    parser.add_argument("--map", action="store_true", help="time the map alone, on factors of large models")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count this process's CPU seconds, not wall seconds"
    )
    parser.add_argument(
        "--rss-of", choices=METHODS, help="print the resident memory of one method in this process"
    )
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock(device, arguments.cpu_time)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(sys.stderr):  # libraries that log to stdout would spoil the one line
        if arguments.rss_of:
            report = resident_report(arguments.rss_of, device, clock)
        elif arguments.map:
            if odd := [name for name in os.environ if name.startswith("MALLOC_")]:
                parser.error(f"the map is measured with the allocator's defaults: unset {', '.join(odd)}")
            torch.set_num_threads(1)
            report = map_report(device, clock)
        else:
            report = overhead_report(device, clock, arguments.quick)
    print(json.dumps(report))


def setting(device: torch.device, clock: Clock) -> dict[str, str]:
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"
    )
    return {"device": name, "torch": torch.__version__, "time": "cpu" if clock.cpu_time else "wall"}


@dataclass(frozen=True)
class Clock:
    device: torch.device
    cpu_time: bool

    def now(self) -> float:
        """Seconds; what the device has been told to do is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.cpu_time else time.perf_counter()


class HookTimer:
    """Times an optimizer's hooks apart from its update. Make it after the hooks: its own are the innermost."""

    def __init__(self, optimizer: torch.optim.Optimizer, clock: Clock):
        self.optimizer, self.clock = optimizer, clock
        optimizer.register_step_pre_hook(self._begin_update)
        last = optimizer.register_step_post_hook(self._end_update)
        optimizer._optimizer_step_post_hooks.move_to_end(last.id, last=False)

    def step(self) -> float:
        """Step the optimizer: seconds that its hooks took."""
        started = self.clock.now()
        self.optimizer.step()
        return self.clock.now() - started - (self.updated - self.updating)

    def _begin_update(self, *_) -> None:
        self.updating = self.clock.now()

    def _end_update(self, *_) -> None:
        self.updated = self.clock.now()


# --- the methods on one model --------------------------------------------------------------------------------------


def attached(
    model: nn.Module, optimizer: torch.optim.Optimizer, method: str, batch_size: int
) -> Runtime | None:
    """Return the runtime of a method of `OURS`; None of others."""
    if method not in OURS:
        return None
    return attach(model, optimizer, OURS[method], examples=EXAMPLES, batch_size=batch_size)


class Trainee:
    """A model, one of the methods on it, and the loop that trains it."""

    def __init__(
        self, method: str, device: torch.device, clock: Clock, workload: Workload = SMOLLM2_WORKLOADS["q+v"]
    ):
        config = LlamaConfig(**workload.shape)
        with device:  # a large model is drawn there in seconds, and never as a whole in fp32
            base = AutoModelForCausalLM.from_config(config, dtype=workload.dtype)
        self.model = get_peft_model(base, adapter_of(method, workload.targets)).train()
        self.batch = torch.randint(config.vocab_size, (workload.batch, workload.tokens), device=device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        half = workload.dtype is not torch.float32
        self.autocast = torch.autocast(device.type, workload.dtype if half else None, enabled=half)
        self.clock = clock
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE)
        self.runtime = attached(self.model, self.optimizer, method, workload.batch)
        self.hooks = HookTimer(self.optimizer, clock)
        self.allocates, self.steps = method == "adalora", 0

    def warm_up(self) -> None:
        for _ in range(WARM_UP):
            self.step()

    def step(self) -> tuple[float, float]:
        """One training step: seconds in all, and seconds of what is attached to it."""
        started = self.clock.now()
        with self.autocast:
            loss = self.model(input_ids=self.batch, labels=self.batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        attached = self.hooks.step()
        if self.allocates:
            self.model.base_model.update_and_allocate(self.steps)
        self.optimizer.zero_grad()
        self.steps += 1
        return self.clock.now() - started, attached


def adapter_of(method: str, targets: list[str]) -> LoraConfig:
    if method == "adalora":  # PEFT's own schedule: the budget shrinks, and is allocated anew, in every step
        return AdaLoraConfig(
            task_type="CAUSAL_LM",
            target_modules=targets,
            init_r=ADALORA_INITIAL_RANK,
            target_r=RANK,
            total_step=2 * (WARM_UP + MOST_ROUNDS),
        )
    return LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=RANK, use_dora=method == "dora")


def overhead_report(device: torch.device, clock: Clock, quick: bool) -> dict:
    return {
        "benchmark": "overhead",
        **setting(device, clock),
        "model": f"SmolLM2-135M's shape, random fp32 weights, r={RANK}, {BATCH}x{TOKENS} tokens where no more are named",
        "adapted": {
            name: workload_report(workload, device, clock, quick)
            for name, workload in SMOLLM2_WORKLOADS.items()
        },
        "peak_rss_ratio": None if quick or device.type == "cuda" else ratios_to_lora(resident_bytes()),
    }


def workload_report(workload: Workload, device: torch.device, clock: Clock, quick: bool) -> dict:
    deadline = time.perf_counter() + (QUICK_SECONDS if quick else SECONDS)
    trainees, peaks = {}, {}
    for method in workload.methods:
        progress(f"memory of {method}, {'+'.join(workload.targets)}")
        trainees[method], peaks[method] = started_trainee(method, device, clock, workload)
    rounds = timed_rounds(trainees, deadline)
    return {
        "rounds": len(rounds),
        **time_figures(rounds),
        "map_ms": round(trainees["structlora"].runtime.metrics()["structlora/map_ms"], 2),
        "gate_kernels": gate_kernels(trainees),
        "peak_memory_ratio": ratios_to_lora(peaks),
        "peak_bytes": peaks,
        "held_bytes": {m: held_bytes(trainees[m].runtime) for m in OURS},
        **adalora_directions(trainees),
    }


def adalora_directions(trainees: dict[str, Trainee]) -> dict[str, dict[str, int]]:
    """How many directions AdaLoRA had at first and has now, where it is one of the methods."""
    if "adalora" not in trainees:
        return {}
    ranks = trainees["adalora"].model.peft_config["default"].rank_pattern
    start, end = len(ranks) * ADALORA_INITIAL_RANK, sum(map(sum, ranks.values()))
    return {"adalora_directions": {"start": start, "end": end}}


class CountedOperators(TorchDispatchMode):
    """Counts the operators that compute: neither views nor memory that is only taken."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if not operator.is_view and "empty" not in operator.name():
            self.counts[operator.name()] += 1
        return operator(*args, **(kwargs or {}))


def gate_kernels(trainees: dict[str, Trainee]) -> dict[str, float]:
    """Operators that one gate adds to a forward and to a backward: those of the model with gates less those of plain LoRA."""
    counts = {}
    for method in ("lora", "gates"):
        trainee = trainees[method]
        with CountedOperators() as forward:
            loss = trainee.model(input_ids=trainee.batch, labels=trainee.batch).loss
        with CountedOperators() as backward:
            loss.backward()
        trainee.optimizer.zero_grad()
        counts[method] = {"forward": forward.counts.total(), "backward": backward.counts.total()}
    gates = sum(name.endswith("lora_A.default") for name, _ in trainees["gates"].model.named_modules())
    return {way: (counts["gates"][way] - counts["lora"][way]) / gates for way in ("forward", "backward")}


def time_figures(rounds: list[dict[str, tuple[float, float]]]) -> dict:
    seconds = {method: [r[method][0] for r in rounds] for method in rounds[0]}
    ratios = {method: [r[method][0] / r["lora"][0] for r in rounds] for method in rounds[0]}
    added = {m: statistics.median(r[m][1] for r in rounds) for m in OURS}
    return {
        "step_time_ratio": {m: round(statistics.median(r), 4) for m, r in ratios.items()},
        "step_time_ratio_quartiles": {m: quartiles(r) for m, r in ratios.items()},
        "step_ms": {m: milliseconds(statistics.median(s)) for m, s in seconds.items()},
        "added_ms": {m: milliseconds(value) for m, value in added.items()},
        "added_ratio": {
            m: round(1 + value / statistics.median(seconds["lora"]), 4) for m, value in added.items()
        },
    }


def timed_rounds(trainees: dict[str, Trainee], deadline: float) -> list[dict[str, tuple[float, float]]]:
    """One step of each method per round, in shuffled order, for as long as a round fits before the deadline."""
    order, rounds, longest = random.Random(0), [], 0.0
    while len(rounds) < MOST_ROUNDS and (not rounds or time.perf_counter() + longest < deadline):
        started = time.perf_counter()
        rounds.append(
            {method: trainees[method].step() for method in order.sample(list(trainees), len(trainees))}
        )
        longest = max(longest, time.perf_counter() - started)
        progress(f"round {len(rounds)}: " + ", ".join(f"{m} {rounds[-1][m][0]:.2f} s" for m in trainees))
    return rounds


def quartiles(values: list[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [round(low, 4), round(high, 4)]


# --- memory --------------------------------------------------------------------------------------------------------


def started_trainee(
    method: str, device: torch.device, clock: Clock, workload: Workload
) -> tuple[Trainee, int]:
    """A trainee that is warm, and the peak bytes of getting there."""
    trainees = []

    def start() -> None:
        trainees.append(Trainee(method, device, clock, workload))
        trainees[0].warm_up()

    gc.collect()
    peak = peak_allocated_bytes(start, device)
    return trainees[0], peak


def peak_allocated_bytes(work: Callable[[], object], device: torch.device) -> int:
    """How far torch's allocator rises above its present level while `work` runs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        level = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - level
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


def resident_bytes() -> dict[str, float]:
    """Median peak resident set of each method, in processes of their own."""
    found = {method: [] for method in METHODS}
    for repeat, method in itertools.product(range(RSS_REPEATS), METHODS):
        progress(f"resident memory of {method}, {repeat + 1} of {RSS_REPEATS}")
        command = [sys.executable, "-m", __spec__.name, "--rss-of", method]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[method].append(json.loads(output)["peak_rss_bytes"])
    return {method: statistics.median(values) for method, values in found.items()}


def resident_report(method: str, device: torch.device, clock: Clock) -> dict[str, int]:
    """Peak resident set of this process once it has trained; Linux alone tells."""
    # Loads DeepSpeed where it is installed, as any Trainer does (and `attach`): some 30 MB that are no method's own.
    extract_model_from_parallel(nn.Identity())
    Trainee(method, device, clock).warm_up()
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"peak_rss_bytes": BYTES_PER_KB * int(lines["VmHWM"].split()[0])}


def ratios_to_lora(values: dict[str, float]) -> dict[str, float]:
    return {method: round(value / values["lora"], 4) for method, value in values.items()}


def held_bytes(runtime: Runtime) -> dict[str, int]:
    """Bytes that StructLoRA keeps between steps, by what they are. It has latents of the sides that are mapped."""
    held = dict.fromkeys(("latents", "origins", "coordinators", "their AdamW", "graph"), 0)
    sides = {m.kind.name: mapped_sides(m.kind, runtime.config) for m in runtime.maps}
    for name, value in State.parse(runtime.state_dict()).tensors.items():
        kind, _, entry = name.rpartition("/")
        if not entry.startswith("latent_") or entry.removeprefix("latent_") in sides[kind]:
            held[part_of(entry)] += value.nbytes
    return {"all": sum(held.values()), **held}


def part_of(name: str) -> str:
    """What an entry of a state is, by its name within its kind."""
    starts = {"latent_": "latents", "origin_": "origins", "optimizer.": "their AdamW", "graph.": "graph"}
    return next((part for start, part in starts.items() if name.startswith(start)), "coordinators")


# --- the map alone -------------------------------------------------------------------------------------------------


def map_report(device: torch.device, clock: Clock) -> dict:
    found = {}
    for stack in STACKS:
        progress(f"map of {stack.name}")
        found[stack.name] = map_cost(stack, device, clock)
    return {"benchmark": "map", **setting(device, clock), "stacks": found, "linearity": linearity(found)}


def linearity(found: dict[str, dict]) -> float:
    """Exponent of depth in the time of stacks that differ in depth alone, by least squares of the logarithms."""
    depths = [stack for stack in STACKS if stack.name in found and stack.name == f"{stack.depths} depths"]
    points = [(math.log(stack.depths), math.log(found[stack.name]["ms_per_step"])) for stack in depths]
    return round(statistics.linear_regression(*zip(*points, strict=True)).slope, 3)


def map_cost(stack: Stack, device: torch.device, clock: Clock) -> dict:
    """What StructLoRA adds to an optimizer step over a stack of factors: milliseconds and bytes."""
    kinds = [build_kind(stack, name, device) for name in stack.widths]
    parameters = [p for kind in kinds for p in (*kind.A, *kind.B)]
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)  # its update is not counted
    engine = TorchEngine(optimizer, kinds)
    ungated = Gating([], None, engine, Forward())  # gates are in no optimizer step's map
    runtime = Runtime(Plan(Factors(parameters), kinds, StructLoRAConfig(), engine, ungated, align=True))
    for m in runtime.maps:
        m.graph.redraw_every = NEVER  # the edges are drawn here, and timed apart
    hooks = HookTimer(optimizer, clock)

    def step() -> tuple[float, int]:
        fill_gradients(kinds)
        before = page_faults()
        return hooks.step(), page_faults() - before

    def rebuild() -> float:
        started = clock.now()
        for m in runtime.maps:
            m.graph.rebuild(m.graph.gradient_products())
        return clock.now() - started

    for _ in range(MAP_WARM_UP):
        step()
    rebuilding = statistics.median(rebuild() for _ in range(REBUILDS))
    times, faults = zip(*(step() for _ in range(MAP_STEPS)), strict=True)
    ordinary = statistics.median(times)
    amortised = ordinary + rebuilding / DepthGraph.redraw_every
    fill_gradients(kinds)
    passing = peak_allocated_bytes(hooks.step, device)
    held, lora_bytes = held_bytes(runtime), sum(p.nbytes for p in parameters)
    return {
        "shape": f"{stack.depths} depths, {len(kinds)} kinds, r={stack.rank}",
        "ms_per_step": milliseconds(amortised),
        "ms_per_step_and_depth": milliseconds(amortised / stack.depths),
        "ms_of_edge_rebuild": milliseconds(rebuilding),
        "semantic_edges": sum(m.graph.semantic_edge_count for m in runtime.maps),
        "page_faults": statistics.median(faults),
        "lora_bytes": lora_bytes,
        "held_bytes": held,
        "passing_bytes": passing,
        "held_bytes_per_lora_byte": round(held["all"] / lora_bytes, 3),
        "passing_bytes_per_lora_byte": round(passing / lora_bytes, 3),
    }


class Factors(nn.ParameterList):
    """What a runtime asks of a PEFT model."""

    active_adapters = ("default",)


def page_faults() -> int:
    """Pages that this process has been given so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def build_kind(stack: Stack, name: str, device: torch.device) -> Kind:
    """Trained factors, from an aligned start: the depths' lora_A are equal, as `attach` makes them."""
    width_in, width_out = stack.widths[name]
    A = torch.randn(stack.rank, width_in, device=device) / width_in**0.5
    modules = [f"layers.{depth}.{name}" for depth in range(stack.depths)]
    return Kind(
        f"layers.*.{name}",
        modules,
        [nn.Parameter(A.clone()) for _ in modules],
        [nn.Parameter(torch.zeros(width_out, stack.rank, device=device)) for _ in modules],
    )


def fill_gradients(kinds: list[Kind]) -> None:
    """Random gradients that agree over depth so far that semantic edges are drawn."""
    for kind in kinds:
        for factors in (kind.A, kind.B):
            shared = SHARED_GRADIENT * torch.randn_like(factors[0])
            for factor in factors:
                factor.grad = torch.randn_like(factor).add_(shared)


def milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 3)


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
