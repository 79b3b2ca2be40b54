"""Runs cells and keeps what they give.

    python -m benchmarks.quality.run list                          what is stored of each grid, and what is missing
    python -m benchmarks.quality.run grid gates --workers 2
    python -m benchmarks.quality.run cell --task digits-all@50 --method lora --rank 8 --examples 100 --lr 0.005 --seed 0
    python -m benchmarks.quality.run pack                          into the compressed file, which git keeps

Cells that are in the store already are skipped, so that a run that was interrupted goes on where it stopped. Any number
of processes may work on the same grid. Rates are chosen as soon as the runs are there that choose them.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from . import assets, store
from .selection import Cell, Runs
from .settings import GRIDS, HALVES, LORA, Grid

WAIT = 20  # seconds, where other processes are at all that is left


def work(grid: Grid, results: Path, task: str = "") -> None:
    """Run the cells of a grid, of tasks whose names begin so, until none is missing."""
    from . import pretrain  # torch, PEFT and the rest, once there is work to do

    torch.set_num_threads(1)  # OMP_NUM_THREADS comes too late for a process that has torch already
    unpaired = set()
    while True:
        lines = store.read(results)
        cells = [cell for cell in Runs(lines).cells(grid) if cell[0].startswith(task)]
        unpaired |= without_a_pair(cells, lines, pretrain.fingerprint)
        missing = missing_of(cells, lines)
        left = [cell for cell in missing if cell not in unpaired]
        ready = [cell for cell in left if cell[4] is not None]
        if not ready:
            if missing:
                print(
                    f"{len(missing)} cells left out: they pair with runs on another ViT than this machine's"
                )
            return
        if not run_all(ready, results):
            time.sleep(WAIT)


def run_all(cells: Iterable[Cell], results: Path) -> int:
    """Run the cells that nobody has run or is running. Return how many these were."""
    from . import cell

    count = 0
    for key in cells:
        with claim(key) as ours:
            if not ours or key in {store.key_of(line) for line in store.read(results)}:
                continue
            line = cell.run(*key)
            store.append(line, results)
            count += 1
            print(f"{time.strftime('%H:%M:%S')} {_summary(line)}", flush=True)
    return count


def missing_of(cells: list[Cell], lines: list[dict]) -> list[Cell]:
    """Return the cells that are not in the store."""
    done = {store.key_of(line) for line in lines}
    return [cell for cell in cells if cell not in done]


def without_a_pair(cells: list[Cell], lines: list[dict], fingerprint: Callable[[], str]) -> set[Cell]:
    """Return the cells whose LoRA run is on another ViT than this machine has: no table would show them beside it
    (`selection.on_one_backbone`).

    Args:
        lines (`list[dict]`): of the store.
        fingerprint (callable): of this machine's ViT, which is trained for it; asked where some run names one.
    """
    named = {
        (line["task"], line["examples"], line["seed"]): line["backbone"]
        for line in lines
        if line["method"] == LORA and "backbone" in line
    }
    wanted = {
        key: named[pair] for key in cells if key[1] != HALVES and (pair := (key[0], key[3], key[-1])) in named
    }
    ours = fingerprint() if wanted else None
    return {key for key, backbone in wanted.items() if backbone != ours}


@contextlib.contextmanager
def claim(key: Cell):
    """True for one process at a time, whose cell it is to run; the claim ends with the process, however it ends."""
    folder = assets.CACHE / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    path.unlink(missing_ok=True)


def _summary(line: dict) -> str:
    name = " ".join(str(part) for part in store.key_of(line))
    return f"{name}: test {line['test']['accuracy']:.1f} %, NLL {line['test']['nll']:.3f}, {line['seconds']:.0f} s"


def listing(results: Path) -> str:
    """Return how many runs of each grid and place are stored and missing."""
    lines = store.read(results)
    runs, shown = Runs(lines), []
    for name, grid in GRIDS.items():
        cells = runs.cells(grid)
        missing = missing_of(cells, lines)
        shown.append(
            f"{name}: {len(cells) - len(missing)} of {len(cells)} runs stored, {len(missing)} missing"
        )
        for place in grid.places:
            here = [cell for cell in cells if (cell[0], cell[3]) == (place.task, place.examples)]
            done = len(here) - sum(cell in set(missing) for cell in here)
            shown.append(f"  {place}: {done} of {len(here)}")
    return "\n".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=store.RESULTS, help="directory of the store")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("cell", help="run one cell and print its line")
    for name, kind in zip(store.KEY, (str, str, int, int, float, int), strict=True):
        one.add_argument(f"--{name}", type=kind, required=True)
    grid = commands.add_parser("grid", help="run the cells of grids that the store lacks")
    grid.add_argument("name", choices=GRIDS, nargs="+")
    grid.add_argument("--task", default="", help="only tasks whose names begin so: smollm, digits-all@50")
    grid.add_argument("--workers", type=int, default=1)
    commands.add_parser("list", help="what is stored of each grid, and what is missing")
    commands.add_parser("pack", help="move new runs into the compressed file")
    options = parser.parse_args()

    if options.command == "cell":
        from . import cell

        print(json.dumps(cell.run(*(getattr(options, name) for name in store.KEY))))
    elif options.command == "list":
        print(listing(options.results))
    elif options.command == "pack":
        print(f"{store.pack(options.results)} runs in {options.results / store.PACKED}")
    elif options.workers == 1:
        os.environ |= ENVIRONMENT
        for name in options.name:
            work(GRIDS[name], options.results, options.task)
    else:
        start = [sys.executable, "-m", __spec__.name, "--results", str(options.results), "grid"]
        start += [*options.name, "--task", options.task]
        workers = [subprocess.Popen(start, env=os.environ | ENVIRONMENT) for _ in range(options.workers)]
        if any([worker.wait() for worker in workers]):
            raise SystemExit("a worker stopped with an error; what was finished is kept")


ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
}

if __name__ == "__main__":
    main()
