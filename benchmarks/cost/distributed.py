"""What StructLoRA costs under each distributed engine: time and bytes sent; and the analytical model's estimates.

    python -m benchmarks.cost.distributed                            # every engine at 2 processes
    python -m benchmarks.cost.distributed --quick --engines zero2    # fewer rounds, some of the engines
    python -m benchmarks.cost.distributed --counts --processes 2 4   # without times
    python -m benchmarks.cost.distributed --paper                    # the analytical model alone: LLaMA-70B on up to 1024 GPUs

Prints one JSON line; progress goes to stderr. How it measures:

* Model: SmolLM2-135M's shape with random weights, query and value adapted, r = 8. Processes speak gloo.
* Methods: LoRA, StructLoRA with gates alone (`coordinator="none"`), and the whole method: three models under the same engine
  in the same processes.
* Time: as in `overhead.py`, on the first rank. CPU seconds (`--cpu-time`) do not count waiting.
* Bytes sent: every collective is recorded as torch dispatches it, in as many steps as lie between two draws of the edges, with
  the bytes that leave a rank in a ring: of an all-reduce 2(n - 1)/n of the payload, of an all-gather n - 1 times what a rank
  gives. What StructLoRA adds is the difference to LoRA. So with `traffic`, the bytes that all other operations read and write as
  if none were fused or cached, and `operations`.
* `held_bytes` are the offsets and running means that the first rank holds between steps.
* Counts are of a model with small MLPs, a small vocabulary and a short batch: the LoRA factors, and so all that is counted, are
  the same. Collectives and bytes sent must be what the model (`scale.py`) predicts; otherwise the benchmark fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from structlora_trl.core.graph import DepthGraph

from . import overhead, scale
from .overhead import OURS, QUICK_ROUNDS, ROUNDS, SMOLLM2_135M, TARGETS, Clock, Workload, progress

METHODS = ("lora", *OURS)
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"
TIMED = Workload(TARGETS["q+v"], batch=4)
COUNTED = Workload(TARGETS["q+v"], 1, 8, SMOLLM2_135M | {"intermediate_size": 64, "vocab_size": 128})
REPORT = "REPORT "


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", choices=scale.ENGINES, default=scale.ENGINES)
    parser.add_argument("--processes", nargs="+", type=int, default=[2])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}")
    parser.add_argument("--counts", action="store_true", help="counts and the model, without times")
    parser.add_argument("--paper", action="store_true", help="the model alone, without a measurement")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds, not wall seconds")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rounds = 0 if arguments.counts else QUICK_ROUNDS if arguments.quick else ROUNDS
    if arguments.worker:
        return worker(arguments.engines[0], rounds, arguments.cpu_time)
    cells = [] if arguments.paper else [(e, n) for n in arguments.processes for e in arguments.engines]
    found = {cell: start(*cell) for cell in cells}
    measured = {f"{engine}, {n} processes": report for (engine, n), report in found.items()}
    print(
        json.dumps({"benchmark": "distributed", "measured": measured, "paper": scale.estimates(tuple(OURS))})
    )
    wrong = [line for cell, report in found.items() for line in scale.disagreements(*cell, report["counts"])]
    return sys.exit("\n".join(wrong)) if wrong else None


def start(engine: str, processes: int, options: list[str] | None = None) -> dict:
    """Measure one engine in processes of its own: DeepSpeed lets go of no model while they live."""
    progress(f"{engine} at {processes} processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["--module", "benchmarks.cost.distributed", *(sys.argv[1:] if options is None else options)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command += ["--worker", "--engines", engine]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    reports = [line.removeprefix(REPORT) for line in done.stdout.splitlines() if line.startswith(REPORT)]
    if not reports:
        sys.exit(f"{engine}: its processes ended with code {done.returncode}\n{done.stdout[-2000:]}")
    return json.loads(reports[0])


# --- in each process -----------------------------------------------------------------------------------------------


def worker(engine: str, rounds: int, cpu_time: bool) -> None:
    dist.init_process_group("gloo")
    clock = Clock(torch.device("cpu"), cpu_time)
    report = {"counts": counts_of(engine, clock)}
    if rounds:
        trainees = {method: Trainee(method, engine, clock, TIMED).warmed() for method in METHODS}
        report["times"] = overhead.time_figures(overhead.timed_rounds(trainees, rounds))
    if dist.get_rank() == 0:
        print(REPORT + json.dumps(report), flush=True)
    dist.barrier()
    os._exit(0)  # as in the tests: gloo's threads beside DeepSpeed's may abort when they are torn down


class Trainee(overhead.Trainee):
    """LoRA or StructLoRA on one model, under one engine."""

    def __init__(self, method: str, engine: str, clock: Clock, workload: Workload):
        torch.manual_seed(0)
        self.engine = engine
        super().__init__(method, clock, workload)

    def owned(self, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model and its optimizer, owned by an engine; the real one, or an error."""
        if self.engine.startswith("zero"):
            import deepspeed

            sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # takes a minute to compile
            config = json.loads((CONFIGS / f"{self.engine}.json").read_text())
            config |= {"train_micro_batch_size_per_gpu": len(self.batch), "gradient_accumulation_steps": 1}
            config |= {"gradient_clipping": 0.0, "bf16": {"enabled": False}, "steps_per_print": 10**9}
            _, optimizer = super().owned(model)
            model, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
            assert model.zero_optimization_stage() == int(self.engine[4])
            return model, optimizer
        if self.engine == "ddp":
            model = DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for module in (*model.get_base_model().model.layers, model):
                fully_shard(module, mesh=mesh)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        return super().owned(model)

    def step(self) -> tuple[float, float]:
        dist.barrier()
        return super().step()

    def update(self, loss: Tensor) -> None:
        if self.engine.startswith("zero"):
            self.model.backward(loss)
            self.model.step()
        else:
            super().update(loss)


def counts_of(engine: str, clock: Clock) -> dict[str, dict]:
    """What each method of ours adds to a step of LoRA, on average between two draws of the edges."""
    steps, counted = DepthGraph.redraw_every, {}
    for method in METHODS:
        trainee = Trainee(method, engine, clock, COUNTED).warmed()
        with Recorder() as recorder:
            for _ in range(steps):
                trainee.step()
        counted[method] = Counter({name: value / steps for name, value in recorder.counts.items()})
        if method in OURS:
            counted[method].subtract(counted["lora"])
            held = [t for side in trainee.runtime.sides for t in (side.offset, side.mean)]
            counted[method]["held_bytes"] = sum(t.nbytes for t in held)
        del trainee
        gc.collect()
    return {method: counted[method] for method in OURS}


class Recorder(TorchDispatchMode):
    """Collectives with the bytes that leave a rank, and the bytes that all other operations read and write."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its operations on local tensors come by again
        result = function(*args, **(kwargs or {}))
        namespace, name = function.name().split("::")
        name = name.split(".")[0].strip("_")
        if namespace == "c10d" and name != "barrier":
            sent = bytes_sent(name, args, dist.get_world_size())
            self.counts.update({"collectives": 1, "bytes_sent": sent, f"bytes of {name}": sent})
        elif not function.is_view and "empty" not in name:  # which compute nothing
            touched = sum(t.nbytes for t in (*tensors((args, kwargs)), *tensors(result)))
            self.counts.update({"operations": 1, "traffic": touched})
        return result


def bytes_sent(name: str, args: tuple, ranks: int) -> float:
    """What leaves a rank in a collective, in rings; `args` as c10d takes them."""
    nbytes = sum(t.nbytes for t in tensors(args[0]))  # in place; or the output, where that comes first
    if name in ("allreduce", "allreduce_coalesced"):
        return 2 * (ranks - 1) / ranks * nbytes
    if name in ("allgather", "allgather_base", "broadcast", "reduce"):
        return (ranks - 1) / ranks * nbytes
    if name in ("reduce_scatter", "reduce_scatter_base"):
        return (ranks - 1) * nbytes
    raise NotImplementedError(f"bytes that {name} sends")


def tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


if __name__ == "__main__":
    main()
