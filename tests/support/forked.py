"""Python scripts in processes that have the libraries imported already: importing takes most of a short job's time.

A fork server of `multiprocessing` imports them once; each process of a job is a fork of it.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

PRELOADED = ["trl.trainer.sft_trainer", "trl.trainer.callbacks", "peft", "transformers.trainer", "deepspeed"]
POLL = 0.02  # seconds
GRACE = 20  # seconds that processes have to end by themselves after one has failed

_context = multiprocessing.get_context("forkserver")


def run_forked(script: list[str], world: int | None, environment: dict[str, str], timeout: float = 300):
    """Run a script in some processes, with the variables that torchrun gives them, as `subprocess.run` does.

    Args:
        script (`list[str]`): the file and its arguments.
        world (`int`, *optional*): number of processes; where omitted, one that no launcher has started.
        environment (`dict[str, str]`): their environment. `MASTER_PORT` must be in it where there are several.
        timeout (`float`, *optional*, defaults to 300): seconds.

    Returns:
        `subprocess.CompletedProcess`: the first exit code that is not 0, and what all have written, by rank.
    """
    _start_server()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{rank}.log" for rank in range(world or 1)]
        variables = [_of_rank(rank, world) if world else {} for rank in range(world or 1)]
        processes = [
            _context.Process(target=_rank, args=(script, {**environment, **own}, output))
            for own, output in zip(variables, outputs, strict=True)
        ]
        for process in processes:
            process.start()
        _join(processes, timeout)
        code = next((p.exitcode for p in processes if p.exitcode), 0)
        text = "".join(output.read_text(errors="replace") for output in outputs if output.exists())
    return subprocess.CompletedProcess(script, code, text, "")


def _start_server() -> None:
    _context.set_forkserver_preload(PRELOADED)
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # a fork has no threads of a pool
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("OMP_NUM_THREADS") if threads is None else os.environ.update(OMP_NUM_THREADS=threads)


def _of_rank(rank: int, world: int) -> dict[str, str]:
    return {
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        **{name: str(world) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
        "MASTER_ADDR": "127.0.0.1",
    }


def _join(processes: list, timeout: float) -> None:
    """Wait until all have ended, or `GRACE` after one has failed, or until the time is over; kill what still runs."""
    deadline = time.monotonic() + timeout
    while any(p.exitcode is None for p in processes) and time.monotonic() < deadline:
        if any(p.exitcode for p in processes):
            deadline = min(deadline, time.monotonic() + GRACE)
        time.sleep(POLL)
    for process in processes:
        if process.exitcode is None:
            process.kill()
        process.join()


def _rank(script: list[str], environment: dict[str, str], output: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # the default one, as in a process by itself
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = script
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    try:
        runpy.run_path(script[0], run_name="__main__")
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)
