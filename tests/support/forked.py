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
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest.mock import patch

PRELOADED = ["trl.trainer.sft_trainer", "trl.trainer.callbacks", "peft", "transformers.trainer", "deepspeed"]
GRACE = 20  # seconds that processes have to end after the first one

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
    _context.set_forkserver_preload(PRELOADED)
    with patch.dict(os.environ, OMP_NUM_THREADS="1"):  # a fork has no threads of a pool
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, f"{rank}.log") for rank in range(world or 1)]
        processes = []
        for rank, output in enumerate(outputs):
            variables = environment
            if world:
                own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
                own = {name: str(number) for name, number in own.items()}
                variables = {**environment, **own, "MASTER_ADDR": "127.0.0.1"}
            processes.append(_context.Process(target=_rank, args=(script, variables, output)))
            processes[-1].start()
        connection.wait([process.sentinel for process in processes], timeout)
        for process in processes:
            process.join(GRACE)
            process.kill()
            process.join()
        code = next((p.exitcode for p in processes if p.exitcode), 0)
        text = "".join(output.read_text(errors="replace") for output in outputs if output.exists())
    return subprocess.CompletedProcess(script, code, text, "")


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
