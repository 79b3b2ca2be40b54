"""What StructLoRA costs, with and without its coordinator, next to LoRA, DoRA and AdaLoRA.

    python -m benchmarks.cost.overhead            # all methods on a model of SmolLM2-135M's shape
    python -m benchmarks.cost.overhead --quick    # the same in fewer rounds

Prints one JSON line; progress goes to stderr. How it measures:

* Weights are random, since neither time nor memory depends on them: nothing is downloaded. Gates act throughout.
* Query and value are adapted, as in the paper, and then all linear modules, in a short step of 360 tokens; and all linear
  modules in one of 2,048, with LoRA and StructLoRA alone.
* Time: every round takes one step of each method, in an order shuffled anew, and ratios are taken within a round; their
  medians and quartiles are printed. `added_ms` is how long StructLoRA's hooks around the optimizer's update ran.
  It is far less noisy than a difference of whole steps; gates, which are part of the forward, are in whole steps alone.
* Memory: `peak_memory_ratio` compares the peak bytes of torch's allocator from before the model is built to the end of
  the second step: exact and repeatable.
* On a busy machine, `OMP_NUM_THREADS=1` with `--cpu-time` gives steadier figures.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from structlora_trl import Runtime, attach

OURS = {"structlora": {}, "gates": {"coordinator": "none"}}  # name -> options of StructLoRA
METHODS = ("lora", *OURS, "dora", "adalora")
EXAMPLES = 1000  # of a run, which set the price of what gates let through: no figure depends on them
SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size".split()
SMOLLM2_135M = dict(zip(SIZES, (576, 1536, 30, 9, 3, 49152), strict=True)) | {"tie_word_embeddings": True}
TARGETS = {
    "q+v": ["q_proj", "v_proj"],
    "all linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
RANK, ADALORA_INITIAL_RANK = 8, 12
LEARNING_RATE, CLIP = 2e-4, 1.0
WARM_UP, ROUNDS, QUICK_ROUNDS = 2, 20, 6


@dataclass(frozen=True)
class Workload:
    """What is trained: options of `LlamaConfig`, LoRA's targets, a batch of sequences, the frozen weights' dtype, and how."""

    targets: list[str]
    batch: int = 8
    tokens: int = 45
    shape: dict | None = None
    dtype: torch.dtype = torch.float32
    methods: tuple[str, ...] = METHODS


WORKLOADS = {
    **{name: Workload(targets) for name, targets in TARGETS.items()},
    "all linear, 2,048 tokens": Workload(TARGETS["all linear"], tokens=256, methods=("lora", *OURS)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds, not wall seconds")
    arguments = parser.parse_args()
    clock = Clock(torch.device("cuda" if torch.cuda.is_available() else "cpu"), arguments.cpu_time)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(sys.stderr):  # libraries that log to stdout would spoil the one line
        rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
        adapted = {name: cost(workload, clock, rounds) for name, workload in WORKLOADS.items()}
    report = {"benchmark": "overhead", "model": "SmolLM2-135M's shape, r=8", "adapted": adapted}
    on_cpu = f"cpu, {torch.get_num_threads()} thread(s)"
    device = torch.cuda.get_device_name() if clock.device.type == "cuda" else on_cpu
    setting = {"device": device, "torch": torch.__version__, "time": "cpu" if clock.cpu_time else "wall"}
    print(json.dumps(report | setting))


@dataclass(frozen=True)
class Clock:
    device: torch.device
    cpu_time: bool = False

    def now(self) -> float:
        """Seconds; what the device has been told to do is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.cpu_time else time.perf_counter()


class HookTimer:
    """Times the hooks that `attach` gives an optimizer, apart from its update."""

    def __init__(self, optimizer: torch.optim.Optimizer, clock: Clock, attach: Callable[[], Runtime | None]):
        self.clock, self.marks = clock, []
        optimizer.register_step_pre_hook(self._mark)
        self.runtime = attach()
        optimizer.register_step_pre_hook(self._mark)
        inner = optimizer.register_step_post_hook(self._mark)
        optimizer._optimizer_step_post_hooks.move_to_end(inner.id, last=False)
        optimizer.register_step_post_hook(self._mark)

    def _mark(self, *_) -> None:
        self.marks.append(self.clock.now())

    def seconds(self) -> float:
        """Return how long the hooks have run since this was asked last."""
        starts, stops, self.marks = self.marks[::2], self.marks[1::2], []
        return sum(stops) - sum(starts)


# --- the methods on one model --------------------------------------------------------------------------------------


class Trainee:
    """A model, one of the methods on it, and the loop that trains it."""

    def __init__(self, method: str, clock: Clock, workload: Workload):
        self.clock, self.steps, device = clock, 0, clock.device
        config = LlamaConfig(**(workload.shape or SMOLLM2_135M))
        with device:  # a large model is drawn there in seconds, and never as a whole in fp32
            base = AutoModelForCausalLM.from_config(config, dtype=workload.dtype)
        model = get_peft_model(base, adapter_of(method, workload.targets)).train()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.batch = torch.randint(config.vocab_size, (workload.batch, workload.tokens), device=device)
        half = workload.dtype is not torch.float32
        self.autocast = torch.autocast(device.type, workload.dtype if half else None, enabled=half)
        self.model, self.optimizer = self.owned(model)
        options, sizes = OURS.get(method), {"examples": EXAMPLES, "batch_size": workload.batch}
        self.hooks = HookTimer(
            getattr(self.optimizer, "optimizer", self.optimizer),  # DeepSpeed's inner one
            clock,
            lambda: None if options is None else attach(self.model, self.optimizer, options, **sizes),
        )
        self.runtime, self.allocates = self.hooks.runtime, method == "adalora"

    def owned(self, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        return model, torch.optim.AdamW(self.parameters, lr=LEARNING_RATE)

    def warmed(self) -> Trainee:
        for _ in range(WARM_UP):
            self.step()
        return self

    def step(self) -> tuple[float, float]:
        """One training step: seconds in all, and seconds of what is attached to it."""
        started = self.clock.now()
        with self.autocast:
            loss = self.model(input_ids=self.batch, labels=self.batch).loss
        self.update(loss)
        self.steps += 1
        return self.clock.now() - started, self.hooks.seconds()

    def update(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        if self.allocates:
            self.model.base_model.update_and_allocate(self.steps)
        self.optimizer.zero_grad()


def adapter_of(method: str, targets: list[str]) -> LoraConfig:
    common = {"task_type": "CAUSAL_LM", "target_modules": targets}
    if method == "adalora":  # PEFT's own schedule: the budget shrinks, and is allocated anew, in every step
        ranks = {"init_r": ADALORA_INITIAL_RANK, "target_r": RANK}
        return AdaLoraConfig(**common, **ranks, total_step=2 * (WARM_UP + ROUNDS))
    return LoraConfig(**common, r=RANK, use_dora=method == "dora")


def cost(workload: Workload, clock: Clock, rounds: int) -> dict:
    trainees, peaks = {}, {}
    for method in workload.methods:
        progress(f"memory of {method}, {'+'.join(workload.targets)}")
        trainees[method], peaks[method] = started(method, clock, workload)
    return {
        **time_figures(timed_rounds(trainees, rounds)),
        "peak_memory_ratio": {m: round(peak / peaks["lora"], 4) for m, peak in peaks.items()},
        "peak_bytes": peaks,
    }


def timed_rounds(trainees: dict[str, Trainee], count: int) -> list[dict[str, tuple[float, float]]]:
    """One step of each method per round, in shuffled order."""
    order, rounds = random.Random(0), []
    for number in range(count):
        rounds.append({m: trainees[m].step() for m in order.sample(list(trainees), len(trainees))})
        progress(f"round {number + 1}: " + ", ".join(f"{m} {rounds[-1][m][0]:.2f} s" for m in trainees))
    return rounds


def time_figures(rounds: list[dict[str, tuple[float, float]]]) -> dict:
    """Medians over rounds: of ratios to LoRA, with quartiles; of steps; of what is attached to them."""
    methods = [method for method in METHODS if method in rounds[0]]
    ratios = {m: [r[m][0] / r["lora"][0] for r in rounds] for m in methods}
    seconds = {m: statistics.median(r[m][0] for r in rounds) for m in methods}
    added = {m: statistics.median(r[m][1] for r in rounds) for m in OURS}
    return {
        "rounds": len(rounds),
        "step_time_ratio": {m: round(statistics.median(r), 4) for m, r in ratios.items()},
        "step_time_ratio_quartiles": {m: quartiles(r) for m, r in ratios.items()},
        "step_ms": {m: milliseconds(s) for m, s in seconds.items()},
        "added_ms": {m: milliseconds(s) for m, s in added.items()},
        "added_ratio": {m: round(1 + s / seconds["lora"], 4) for m, s in added.items()},
    }


def quartiles(values: list[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [round(low, 4), round(high, 4)]


# --- memory --------------------------------------------------------------------------------------------------------


def started(method: str, clock: Clock, workload: Workload) -> tuple[Trainee, int]:
    """A trainee that is warm, and the peak bytes of getting there."""
    gc.collect()
    return with_peak(lambda: Trainee(method, clock, workload).warmed(), clock.device)


def with_peak(work: Callable, device: torch.device) -> tuple:
    """What `work` returns, and how far torch's allocator rises above its present level meanwhile."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        level = torch.cuda.memory_allocated()
        return work(), torch.cuda.max_memory_allocated() - level
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return result, max(itertools.accumulate(change for _, change in changes))


def milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 3)


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
