"""What StructLoRA costs under each distributed engine: time, collectives, bytes, and an analytical cost model.

    python -m benchmarks.cost.distributed                      # every engine at 2 processes, then the analytical cost model
    python -m benchmarks.cost.distributed --quick              # fewer rounds, for a first look
    python -m benchmarks.cost.distributed --engines zero2      # some of the engines (see --help)
    python -m benchmarks.cost.distributed --paper              # the analytical cost model alone: LLaMA-70B on 64 and 1024 GPUs

Prints one JSON line; progress goes to stderr. How it measures:

* Model: SmolLM2-135M's shape with random weights, as in `overhead.py`; per process half of its batch. Processes speak gloo.
* Time: LoRA and StructLoRA are two models under the same engine in the same processes. Every round takes one step of each, in
  an order shuffled anew; ratios are taken within a round, on the first rank; medians and quartiles are printed. CPU seconds
  are those of the first rank's process, all threads; on a busy machine they are the steadier figure, but do not count waiting.
* Communication: every collective of one warm step is recorded as torch dispatches it. What StructLoRA adds is the difference
  to LoRA, and must be what the analytical cost model predicts; otherwise the benchmark fails.
* Memory traffic of the map: bytes that its operations read and write in one step, in passes over the fp32 LoRA factors.
  Operations are counted one by one, as if none were fused or cached.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from structlora_trl import attach

from .overhead import (
    BATCH,
    LEARNING_RATE,
    SMOLLM2_135M,
    STACKS,
    TARGETS,
    TOKENS,
    Stack,
    adapter_of,
    progress,
    quartiles,
)

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
METHODS = ("lora", "structlora")
PROCESSES = 2
WARM_UP, ROUNDS, QUICK_ROUNDS = 2, 20, 6
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"
BYTES_PER_FP32, BYTES_PER_BF16 = 4, 2
REPORT = "REPORT "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}")
    parser.add_argument("--paper", action="store_true", help="the analytical cost model alone, without a measurement")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    if arguments.worker:
        worker(arguments.worker, rounds)
        return
    measured = {} if arguments.paper else {engine: start(engine, arguments.quick) for engine in arguments.engines}
    passes = [found["map_passes"] for found in measured.values()]
    report = {"benchmark": "distributed"}
    if measured:
        report |= {
            "model": f"SmolLM2-135M's shape, random fp32 weights, {'+'.join(TARGETS)}, r=8",
            "setting": f"{PROCESSES} processes over gloo on CPU, {BATCH // PROCESSES}x{TOKENS} tokens each",
            "torch": torch.__version__,
            "engines": measured,
        }
    print(json.dumps({**report, "paper": cost_model(max(passes, default=MAP_PASSES))}))


def start(engine: str, quick: bool) -> dict:
    """Measure one engine in processes of its own."""
    progress(f"{engine}: starting")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    command += ["--module", __spec__.name, "--worker", engine, *(["--quick"] if quick else [])]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    reports = [line.removeprefix(REPORT) for line in done.stdout.splitlines() if line.startswith(REPORT)]
    if not reports:
        sys.exit(f"{engine}: the processes ended with code {done.returncode} and no report\n{done.stdout[-2000:]}")
    return json.loads(reports[0])


# --- in each process -----------------------------------------------------------------------------------------------


class Trainee:
    """LoRA or StructLoRA on one model, under one engine."""

    def __init__(self, method: str, engine: str):
        torch.manual_seed(0)
        self.engine = engine
        config = LlamaConfig(**SMOLLM2_135M)
        model = get_peft_model(LlamaForCausalLM(config), adapter_of(method)).train()
        self.batch = torch.randint(config.vocab_size, (BATCH // PROCESSES, TOKENS))
        self.model, self.optimizer = wrap(model, engine)
        self.runtime = attach(self.model, self.optimizer) if method == "structlora" else None

    def step(self) -> dict[str, float]:
        """One training step; seconds by each clock."""
        dist.barrier()
        started = {name: clock() for name, clock in CLOCKS.items()}
        if self.runtime:
            self.runtime.train()
        loss = self.model(input_ids=self.batch, labels=self.batch).loss
        if self.engine.startswith("zero"):
            self.model.backward(loss)
            self.model.step()
        else:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {name: clock() - started[name] for name, clock in CLOCKS.items()}


def wrap(model: nn.Module, engine: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and its optimizer, owned by an engine; the real one, or an error."""
    if engine.startswith("zero"):
        import deepspeed

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # takes a minute to compile
        config = json.loads((CONFIGS / f"{engine}.json").read_text())
        config |= {"train_micro_batch_size_per_gpu": BATCH // PROCESSES, "gradient_accumulation_steps": 1}
        config |= {"gradient_clipping": 0.0, "bf16": {"enabled": False}, "steps_per_print": 10**9}
        optimizer = torch.optim.AdamW(trained(model), lr=LEARNING_RATE)
        model, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        assert model.zero_optimization_stage() == int(engine[4]) and dist.get_world_size() == PROCESSES
        return model, optimizer
    if engine == "fsdp2":
        mesh = init_device_mesh("cpu", (PROCESSES,))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = DistributedDataParallel(model)
    return model, torch.optim.AdamW(trained(model), lr=LEARNING_RATE)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Recorder(TorchDispatchMode):
    """Collectives with their payload, and the bytes that all other operations read and write."""

    def __init__(self):
        super().__init__()
        self.collectives: dict[str, list[int]] = defaultdict(list)
        self.traffic = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its operations on local tensors come by again
        result = function(*args, **(kwargs or {}))
        namespace, name = function.name().split("::")
        name = name.split(".")[0].strip("_")
        taken = tensors((args, kwargs))
        if namespace == "c10d":
            if name != "barrier":
                self.collectives[name].append(max(t.nbytes for t in taken))
        elif not function.is_view:
            self.traffic += sum(t.nbytes for t in (*taken, *tensors(result)))
        return result


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def worker(engine: str, count: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    trainees = {method: Trainee(method, engine) for method in METHODS}
    recorded = {}
    for method, trainee in trainees.items():
        for _ in range(WARM_UP):
            trainee.step()
        with Recorder() as recorded[method]:
            trainee.step()
    order, rounds = random.Random(0), []
    for number in range(count):
        rounds.append({method: trainees[method].step() for method in order.sample(METHODS, len(METHODS))})
        if dist.get_rank() == 0:
            progress(
                f"{engine} round {number + 1}: " + ", ".join(f"{m} {s['wall']:.2f} s" for m, s in rounds[-1].items())
            )
    if dist.get_rank() == 0:
        runtime = trainees["structlora"].runtime
        report = {**time_figures(rounds), **communication(recorded, engine), **map_figures(recorded, runtime)}
        print(REPORT + json.dumps(report), flush=True)
    dist.barrier()
    os._exit(0)  # as in the tests: gloo's threads beside DeepSpeed's may abort when they are torn down


def time_figures(rounds: list[dict[str, dict[str, float]]]) -> dict:
    figures = {"rounds": len(rounds)}
    for clock in CLOCKS:
        ratios = [r["structlora"][clock] / r["lora"][clock] for r in rounds]
        figures[f"{clock}_time_ratio"] = round(statistics.median(ratios), 4)
        figures[f"{clock}_time_ratio_quartiles"] = quartiles(ratios)
        figures[f"{clock}_seconds"] = {m: round(statistics.median(r[m][clock] for r in rounds), 3) for m in METHODS}
    return figures


def communication(recorded: dict[str, Recorder], engine: str) -> dict:
    """Collectives and payload bytes of one step, what StructLoRA adds, checked against the analytical cost model.

    Raises:
        SystemExit: the analytical cost model predicts something else.
    """
    counts = {method: sum(map(len, r.collectives.values())) for method, r in recorded.items()}
    payload = {method: sum(map(sum, r.collectives.values())) for method, r in recorded.items()}
    added = {"collectives": counts["structlora"] - counts["lora"], "bytes": payload["structlora"] - payload["lora"]}
    predicted = added_communication(STACKS[0], sharded=engine != "ddp")
    if added != predicted:
        sys.exit(f"{engine}: StructLoRA adds {added} to a step; the analytical cost model predicts {predicted}")
    return {"collectives_per_step": counts, "bytes_per_step": payload, "added_by_structlora": added}


def map_figures(recorded: dict[str, Recorder], runtime) -> dict:
    traffic = recorded["structlora"].traffic - recorded["lora"].traffic
    return {
        "map_passes": round(traffic / (BYTES_PER_FP32 * parameter_count(STACKS[0])), 1),
        "map_ms": round(runtime.metrics()["structlora/map_ms"], 2),
    }


# --- the analytical cost model -------------------------------------------------------------------------------------

# NVIDIA's data sheet of the H100 SXM; one 400 Gb/s link per GPU between nodes; what is usual for the rest.
FLOPS, UTILISATION = 989e12, 0.4
MEMORY_BANDWIDTH, LINK_BANDWIDTH = 3.35e12, 50e9  # bytes per second
HOP_SECONDS = 5e-6
TOKENS_PER_GPU = 8192  # per optimizer step
LLAMA_70B_PARAMETERS = 70.6e9
MAP_PASSES = 60.0  # for `--paper` alone; a measurement takes its place


@dataclass(frozen=True)
class Cost:
    """What one optimizer step of StructLoRA adds on each GPU of a sharded run, beside a step of LoRA."""

    lora_parameters: int
    collectives: int
    payload_bytes: int
    wire_bytes: int  # sent by each GPU in ring all-reduces
    bandwidth_ms: float
    ring_latency_ms: float
    map_ms: float
    state_bytes: int
    lora_step_ms: float  # arithmetic alone
    zero3_wire_bytes: int  # stage 3's own gathers of the bf16 weights, for comparison
    step_time_ratio: float


def parameter_count(stack: Stack) -> int:
    return sum(stack.depths * stack.rank * (width_in + width_out) for width_in, width_out in stack.widths.values())


def added_communication(stack: Stack, sharded: bool) -> dict:
    """Per optimizer step: one all-reduce that gathers the gradients, one that gathers the masters, each of all factors in
    fp32. Under DDP both are whole on every rank."""
    count = 2 if sharded else 0
    return {"collectives": count, "bytes": count * BYTES_PER_FP32 * parameter_count(stack)}


def cost_model(passes: float) -> dict:
    big = next(stack for stack in STACKS if stack.name == "LLaMA-70B")
    small = Stack("LLaMA-70B", big.depths, 8, {name: big.widths[name] for name in ("q_proj", "v_proj")})
    return {
        "map_passes": passes,
        **{
            f"{stack.name}, {len(stack.widths)} targets, r={stack.rank}, {gpus} GPUs": asdict(cost(stack, gpus, passes))
            for stack in (small, big)
            for gpus in (64, 1024)
        },
    }


def cost(stack: Stack, gpus: int, passes: float) -> Cost:
    """Nothing is assumed to overlap. A ring all-reduce sends 2(n-1)/n of its payload per GPU, in 2(n-1) hops."""
    parameters, added = parameter_count(stack), added_communication(stack, sharded=True)
    factor_bytes = BYTES_PER_FP32 * parameters
    wire = 2 * (gpus - 1) / gpus * added["bytes"]
    bandwidth = wire / LINK_BANDWIDTH
    latency = added["collectives"] * 2 * (gpus - 1) * HOP_SECONDS
    on_gpu = passes * factor_bytes / MEMORY_BANDWIDTH
    # Forward, and gradients of activations: 2 floating-point operations each for every weight and token.
    step = 4 * LLAMA_70B_PARAMETERS * TOKENS_PER_GPU / (FLOPS * UTILISATION)
    return Cost(
        lora_parameters=parameters,
        collectives=added["collectives"],
        payload_bytes=added["bytes"],
        wire_bytes=round(wire),
        bandwidth_ms=round(1000 * bandwidth, 2),
        ring_latency_ms=round(1000 * latency, 2),
        map_ms=round(1000 * on_gpu, 2),
        state_bytes=2 * factor_bytes,  # latents, and the running-mean gradients of the graph
        lora_step_ms=round(1000 * step, 1),
        zero3_wire_bytes=round(2 * (gpus - 1) / gpus * BYTES_PER_BF16 * LLAMA_70B_PARAMETERS),
        step_time_ratio=round(1 + (bandwidth + latency + on_gpu) / step, 4),
    )


if __name__ == "__main__":
    main()
