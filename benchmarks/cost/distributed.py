"""What StructLoRA costs under each distributed engine: time, bytes sent, memory, and the analytical model's estimates.

    python -m benchmarks.cost.distributed                      # every engine: counts at 2, 4 and 8 processes, times at 2
    python -m benchmarks.cost.distributed --quick              # fewer rounds, for a first look
    python -m benchmarks.cost.distributed --engines zero2      # some of the engines (see --help)
    python -m benchmarks.cost.distributed --processes 2 3      # counts at other numbers of processes
    python -m benchmarks.cost.distributed --counts             # the counts alone
    python -m benchmarks.cost.distributed --paper              # the analytical model alone: LLaMA-70B on 64 and 1024 GPUs

Prints one JSON line; progress goes to stderr. How it measures:

* Model: SmolLM2-135M's shape with random weights, as in `overhead.py`; per process half of its batch. Processes speak gloo.
* Methods: LoRA, StructLoRA with gates alone (`coordinator="none"`), and the whole method.
* Time: the three are models under the same engine in the same processes. Every round takes one step of each, in an order
  shuffled anew; ratios to LoRA are taken within a round, on the first rank; medians and quartiles are printed. CPU seconds
  are those of the first rank's process, all threads; on a busy machine they are the steadier figure, but do not count waiting.
* Communication: every collective of one warm step is recorded as torch dispatches it, with the bytes that leave the rank: of
  an all-to-all what is for others, of a ring all-reduce 2(n - 1)/n of the payload, of an all-gather n - 1 times the own share.
  What StructLoRA adds is the difference to LoRA.
* Memory: the bytes that StructLoRA holds between steps, without what belongs to the model and its optimizer; the largest
  tensor that it makes in a step, and how far all that it makes rises. Of the rank that has most.
* Memory traffic: bytes that operations read and write in one step, in passes over the rank's share of the fp32 LoRA factors.
  Operations are counted one by one, as if none were fused or cached; those of gates alone are of their hooks in the forward,
  and of its backward.
* Counts are of a model with small MLPs, a small vocabulary and a short batch: the LoRA factors, and so all that is counted, are
  the same.
* Communication and held bytes must be what the analytical model (`scale.py`) predicts; otherwise the benchmark fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from structlora_trl import Runtime
from structlora_trl.engines.slicing import Exchange

from . import scale
from .overhead import (
    BATCH,
    LEARNING_RATE,
    OURS,
    SMOLLM2_135M,
    SMOLLM2_STACK,
    TARGETS,
    TOKENS,
    adapter_of,
    attached,
    progress,
    quartiles,
)

ENGINES = ("ddp", *scale.SHARDED)
METHODS = ("lora", *OURS)
TIMED_PROCESSES, COUNTED_PROCESSES = 2, (2, 4, 8)
WARM_UP, ROUNDS, QUICK_ROUNDS = 2, 20, 6
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"
SMALL = {"batch": 1, "tokens": 8, "intermediate_size": 64, "vocab_size": 128}  # where counts alone are wanted
REPORT = "REPORT "


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--processes", nargs="+", type=int, default=COUNTED_PROCESSES, help="of the counts")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}")
    parser.add_argument(
        "--counts", action="store_true", help="counts and the analytical model, without times"
    )
    parser.add_argument(
        "--paper", action="store_true", help="the analytical model alone, without a measurement"
    )
    parser.add_argument("--worker", choices=("times", "counts"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.engines[0], QUICK_ROUNDS if arguments.quick else ROUNDS)
        return
    report, times, counts = {"benchmark": "distributed"}, {}, {}
    if not arguments.paper:
        for processes in arguments.processes:
            counts[processes] = {e: start("counts", e, processes, arguments.quick) for e in arguments.engines}
        if not arguments.counts:
            times = {e: start("times", e, TIMED_PROCESSES, arguments.quick) for e in arguments.engines}
        report |= {
            "model": f"SmolLM2-135M's shape, random fp32 weights, {'+'.join(TARGETS['q+v'])}, r={SMOLLM2_STACK.rank}",
            "setting": f"gloo on CPU; times: {TIMED_PROCESSES} processes, {BATCH // TIMED_PROCESSES}x{TOKENS} tokens each",
            "torch": torch.__version__,
            "times": times,
            "counts": counts,
        }
    print(json.dumps({**report, "paper": scale.estimates(scale.work_of(counts.get(2, {})))}))
    problems = [
        p for n, engines in counts.items() for e, found in engines.items() for p in disagreements(n, e, found)
    ]
    if problems:
        sys.exit("\n".join(problems))


def start(what: str, engine: str, processes: int, quick: bool) -> dict:
    """Measure one engine in processes of its own: DeepSpeed lets go of no model while they live."""
    progress(f"{what} of {engine} at {processes} processes")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
    ]
    command += [
        "--module",
        __spec__.name,
        "--worker",
        what,
        "--engines",
        engine,
        *(["--quick"] if quick else []),
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    reports = [line.removeprefix(REPORT) for line in done.stdout.splitlines() if line.startswith(REPORT)]
    if not reports:
        sys.exit(
            f"{engine}: the processes ended with code {done.returncode} and no report\n{done.stdout[-2000:]}"
        )
    return json.loads(reports[0])


def disagreements(processes: int, engine: str, counts: dict[str, dict]) -> Iterator[str]:
    """Where counts are not what the analytical model predicts."""
    for method, found in counts.items():
        predicted = scale.predicted(SMOLLM2_STACK, method, engine, processes)
        for figure, (expected, tolerance) in predicted.items():
            if abs(found[figure] - expected) > tolerance * abs(expected):
                yield f"{engine}, {processes} processes, {method}: {figure} is {found[figure]}, the model predicts {expected}"


# --- in each process -----------------------------------------------------------------------------------------------


def worker(what: str, engine: str, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    report = times_of(engine, rounds) if what == "times" else counts_of(engine)
    if dist.get_rank() == 0:
        print(REPORT + json.dumps(report), flush=True)
    dist.barrier()
    os._exit(0)  # as in the tests: gloo's threads beside DeepSpeed's may abort when they are torn down


class Trainee:
    """LoRA or StructLoRA on one model, under one engine."""

    def __init__(self, method: str, engine: str, batch: int, tokens: int, **shape: int):
        torch.manual_seed(0)
        self.engine = engine
        config = LlamaConfig(**SMOLLM2_135M | shape)
        model = get_peft_model(LlamaForCausalLM(config), adapter_of("lora", TARGETS["q+v"])).train()
        self.batch = torch.randint(config.vocab_size, (batch, tokens))
        self.model, self.optimizer = wrap(model, engine, batch)
        self.runtime = attached(self.model, self.optimizer, method, batch * dist.get_world_size())

    def step(self) -> dict[str, float]:
        """One training step; seconds by each clock."""
        dist.barrier()
        started = {name: clock() for name, clock in CLOCKS.items()}
        loss = self.model(input_ids=self.batch, labels=self.batch).loss
        if self.engine.startswith("zero"):
            self.model.backward(loss)
            self.model.step()
        else:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {name: clock() - started[name] for name, clock in CLOCKS.items()}


def wrap(model: nn.Module, engine: str, batch: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and its optimizer, owned by an engine; the real one, or an error."""
    if engine.startswith("zero"):
        import deepspeed

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # takes a minute to compile
        config = json.loads((CONFIGS / f"{engine}.json").read_text())
        config |= {"train_micro_batch_size_per_gpu": batch, "gradient_accumulation_steps": 1}
        config |= {"gradient_clipping": 0.0, "bf16": {"enabled": False}, "steps_per_print": 10**9}
        optimizer = torch.optim.AdamW(trained(model), lr=LEARNING_RATE)
        model, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        assert model.zero_optimization_stage() == int(engine[4])
        return model, optimizer
    if engine == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = DistributedDataParallel(model)
    return model, torch.optim.AdamW(trained(model), lr=LEARNING_RATE)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# --- times ---------------------------------------------------------------------------------------------------------


def times_of(engine: str, count: int) -> dict:
    trainees = {method: Trainee(method, engine, BATCH // TIMED_PROCESSES, TOKENS) for method in METHODS}
    for trainee in trainees.values():
        for _ in range(WARM_UP):
            trainee.step()
    for method in OURS:
        trainees[method].runtime.metrics()  # which starts its averages anew
    order, rounds = random.Random(0), []
    for number in range(count):
        rounds.append({method: trainees[method].step() for method in order.sample(METHODS, len(METHODS))})
        if dist.get_rank() == 0:
            seconds = ", ".join(f"{m} {s['wall']:.2f} s" for m, s in rounds[-1].items())
            progress(f"{engine} round {number + 1}: {seconds}")
    figures = {"rounds": len(rounds), **time_figures(rounds)}
    figures["map_ms"] = {m: round(trainees[m].runtime.metrics()["structlora/map_ms"], 2) for m in OURS}
    return figures


def time_figures(rounds: list[dict[str, dict[str, float]]]) -> dict:
    """Medians over rounds, by clock: seconds of each method; ratios to LoRA, with quartiles."""
    figures = {}
    for clock in CLOCKS:
        ratios = {m: [r[m][clock] / r["lora"][clock] for r in rounds] for m in OURS}
        figures[f"{clock}_time_ratio"] = {m: round(statistics.median(r), 4) for m, r in ratios.items()}
        figures[f"{clock}_time_ratio_quartiles"] = {m: quartiles(r) for m, r in ratios.items()}
        figures[f"{clock}_seconds"] = {
            m: round(statistics.median(r[m][clock] for r in rounds), 3) for m in METHODS
        }
    return figures


# --- counts --------------------------------------------------------------------------------------------------------


def counts_of(engine: str) -> dict[str, dict]:
    """What each method of ours adds to a step of LoRA."""
    recorded, memory = {}, {}
    for method in METHODS:
        trainee = Trainee(method, engine, **SMALL)
        if dist.get_rank() == 0:
            progress(f"{engine}: {method}")
        for _ in range(WARM_UP):
            trainee.step()
        with Recorder() as recorded[method], MapMemory(trainee.runtime) as memory[method]:
            trainee.step()
        del trainee
        gc.collect()
    return {method: added(recorded["lora"], recorded[method], memory[method]) for method in OURS}


def added(lora: Recorder, ours: Recorder, memory: MapMemory) -> dict:
    sent = of_all_ranks(ours.bytes_sent - lora.bytes_sent)
    share = scale.FP32 * scale.parameter_count(SMOLLM2_STACK) / dist.get_world_size()
    return {
        "collectives": ours.collectives - lora.collectives,
        "collectives_of_lora": lora.collectives,
        "bytes_sent": round(statistics.mean(sent)),
        "bytes_sent_most": round(max(sent)),
        "bytes_sent_by_lora": round(statistics.mean(of_all_ranks(lora.bytes_sent))),
        "by_collective": {
            name: round(ours.by_name[name] - lora.by_name[name])
            for name in sorted(ours.by_name)
            if ours.by_name[name] != lora.by_name[name]
        },
        "share_bytes": round(share),
        "held_bytes": max(of_all_ranks(memory.held)),
        "largest_made_bytes": max(of_all_ranks(memory.largest)),
        "passing_bytes": max(of_all_ranks(memory.peak)),
        "map_passes": round(statistics.mean(of_all_ranks(ours.traffic - lora.traffic)) / share, 1),
        "map_operations": ours.operations - lora.operations,
    }


def of_all_ranks(figure: float) -> list[float]:
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, figure)
    return found


class Recorder(TorchDispatchMode):
    """Collectives with the bytes that leave this rank, and the bytes that all other operations read and write."""

    def __init__(self):
        super().__init__()
        self.collectives = 0
        self.by_name: dict[str, float] = defaultdict(float)
        self.traffic = self.operations = 0

    @property
    def bytes_sent(self) -> float:
        return sum(self.by_name.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its operations on local tensors come by again
        result = function(*args, **(kwargs or {}))
        namespace, name = function.name().split("::")
        name = name.split(".")[0].strip("_")
        if namespace == "c10d":
            if name != "barrier":
                self.collectives += 1
                self.by_name[name] += bytes_sent(name, args, dist.get_rank(), dist.get_world_size())
        elif not function.is_view:
            self.operations += namespace == "aten" and "empty" not in name  # which computes nothing
            self.traffic += sum(t.nbytes for t in (*tensors((args, kwargs)), *tensors(result)))
        return result


def bytes_sent(name: str, args: tuple, rank: int, ranks: int) -> float:
    """What leaves this rank in a collective, in rings where there is a choice; `args` as c10d takes them."""
    nbytes = sum(t.nbytes for t in tensors(args[0]))  # in place; or the output, where that comes first
    if name in ("allreduce", "allreduce_coalesced"):
        return 2 * (ranks - 1) / ranks * nbytes
    if name in ("allgather", "allgather_base", "broadcast", "reduce"):
        return (ranks - 1) / ranks * nbytes
    if name in ("reduce_scatter", "reduce_scatter_base"):
        return (ranks - 1) * nbytes
    if name == "alltoall_base":
        _, outgoing, _, _, sizes = args[:5]
        stays = sizes[rank] / max(sum(sizes), 1) if sizes else 1 / ranks
        return (1 - stays) * outgoing.nbytes
    raise NotImplementedError(f"bytes that {name} sends")


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class MapMemory:
    """What a runtime makes in the steps within it: the largest tensor, and how far all that is alive together rises, in bytes.

    Args:
        runtime (`Runtime`, *optional*): whose; nothing is made where omitted.
    """

    def __init__(self, runtime: Runtime | None):
        self._runtime, self._mode = runtime, _Made()
        self.held = 0

    @property
    def largest(self) -> int:
        return self._mode.largest

    @property
    def peak(self) -> int:
        return self._mode.peak

    def __enter__(self) -> MapMemory:
        self._undo = ExitStack()
        if self._runtime is not None:
            # All that the runtime does in a step, and what its engine reads when the optimizer has stepped.
            stopwatch = self._runtime.stopwatch
            self._runtime.stopwatch = self._mode
            self._undo.callback(setattr, self._runtime, "stopwatch", stopwatch)
            for name in ("to_slices", "to_fragments"):
                verb = getattr(Exchange, name)
                setattr(Exchange, name, self._watched(verb))
                self._undo.callback(setattr, Exchange, name, verb)
        return self

    def __exit__(self, *error) -> None:
        self._undo.close()
        if self._runtime is not None:
            self.held = held_bytes(self._runtime)
        self._runtime = None

    def _watched(self, verb):
        def watched(*args, **kwargs):
            with self._mode:
                return verb(*args, **kwargs)

        return watched


class _Made(TorchDispatchMode):
    """Memory that operations make; may be entered within itself."""

    def __init__(self):
        super().__init__()
        self._depth = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.largest = self.peak = 0

    def __enter__(self):
        self._depth += 1
        return super().__enter__() if self._depth == 1 else self

    def __exit__(self, *error):
        self._depth -= 1
        if self._depth == 0:
            super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        for t in tensors(result):
            storage = t.untyped_storage()
            if storage._cdata not in known:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def held_bytes(runtime: Runtime) -> int:
    """Bytes that StructLoRA keeps between steps, without those of the model and of the optimizer that it is attached to."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [runtime.maps, runtime.engine, runtime._optimizer.state if runtime._optimizer else None]
    theirs = {id(p) for p in runtime.model.parameters()}
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or id(thing) in theirs:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            local = thing.to_local() if isinstance(thing, DTensor) else thing
            found[local.untyped_storage()._cdata] = local.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            waiting += thing.values()
        elif isinstance(thing, (list, tuple)):
            waiting += thing
        elif type(thing).__module__.startswith("structlora_trl") or isinstance(
            thing, (nn.ModuleDict, nn.ModuleList)
        ):
            waiting += vars(thing).values()
    return sum(found.values())


if __name__ == "__main__":
    main()
