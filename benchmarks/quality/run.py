"""Runs cells and keeps what they give.

    python -m benchmarks.quality.run cell --task digits --method structlora --rank 4 --examples 100 --lr 0.01 --seed 0
    python -m benchmarks.quality.run grid structlora --workers 2
    python -m benchmarks.quality.run list

Cells that are in the store already are skipped, so that a run that was interrupted goes on where it stopped. Any number
of processes may work on the same grid.
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
from collections.abc import Callable
from pathlib import Path

import torch

from . import assets, store
from .grids import GRIDS, cells_of
from .settings import COMPARISONS, LORA


def work(cells: list[tuple], results: Path) -> None:
    """Run the cells that nobody has run or is running."""
    from . import cell, pretrain  # torch, PEFT and the rest, once there is work to do

    unpaired = without_a_pair(cells, store.read(results), pretrain.fingerprint)
    if unpaired:
        print(
            f"{len(unpaired)} of {len(cells)} cells pair with runs on another ViT than this machine's: left out",
            flush=True,
        )
    torch.set_num_threads(1)  # OMP_NUM_THREADS comes too late for a process that has torch already
    for i, key in enumerate(cells):
        with claim(key) as ours:
            if not ours or key in unpaired or key in {store.key_of(line) for line in store.read(results)}:
                continue
            line = cell.run(*key)
            store.append(line, results)
            print(f"{time.strftime('%H:%M:%S')} {i + 1}/{len(cells)} {_summary(line)}", flush=True)


def without_a_pair(cells: list[tuple], lines: list[dict], fingerprint: Callable[[], str]) -> set[tuple]:
    """The cells whose LoRA run is on another backbone than this machine has: no table would show them beside it
    (`selection.on_one_backbone`).

    Args:
        lines (`list[dict]`): of the store.
        fingerprint (callable): of this machine's backbone, which is trained for it; asked where some run names one.
    """
    named = {}
    for line in lines:
        if line["method"] == LORA and "backbone" in line:
            named.setdefault((line["task"], line["seed"]), line["backbone"])
    wanted = {key: named[key[0], key[-1]] for key in cells if (key[0], key[-1]) in named}
    ours = fingerprint() if wanted else None
    return {key for key, backbone in wanted.items() if backbone != ours}


@contextlib.contextmanager
def claim(key: tuple):
    """Whether the cell is ours to run: true for one process at a time; the claim ends with it, however it ends."""
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
    return (
        f"{name}: validation {line['validation']['accuracy']:.1f} %, test {line['test']['accuracy']:.1f} %, "
        f"NLL {line['test']['nll']:.3f}, {line['seconds']:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=store.RESULTS, help="directory of the store")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("cell", help="run one cell and print its line")
    for name, kind in zip(store.KEY, (str, str, int, int, float, int), strict=True):
        one.add_argument(f"--{name}", type=kind, required=True)
    one.add_argument("--keep", action="store_true", help="add the line to the store")
    grid = commands.add_parser("grid", help="run the cells of a grid that the store lacks")
    grid.add_argument("name", choices=GRIDS, nargs="+")
    grid.add_argument("--workers", type=int, default=1)
    commands.add_parser("list", help="the grids of the tables, and how much of each is done")
    options = parser.parse_args()

    if options.command == "cell":
        from . import cell

        line = cell.run(*(getattr(options, name) for name in store.KEY))
        print(json.dumps(line))
        if options.keep:
            store.append(line, options.results)
    elif options.command == "list":
        done = {store.key_of(line) for line in store.read(options.results)}
        for name in COMPARISONS:
            cells = cells_of(name)
            print(f"{name}: {sum(key in done for key in cells)} of {len(cells)} cells")
    else:
        command = [
            sys.executable,
            "-m",
            __spec__.name,
            "--results",
            str(options.results),
            "grid",
            *options.name,
        ]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        if options.workers == 1:
            os.environ.update(environment)
            for name in options.name:
                work(cells_of(name), options.results)
        else:
            workers = [subprocess.Popen(command, env=environment) for _ in range(options.workers)]
            if any([worker.wait() for worker in workers]):
                raise SystemExit("a worker stopped with an error; what was finished is kept")


if __name__ == "__main__":
    main()
