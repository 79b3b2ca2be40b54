"""The command line in processes of every launcher, and those that it starts itself."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException

from structlora_trl.cli import launch, main
from tests.support.cli_runs import config_file
from tests.support.launching import ROOT, free_port, one_at_a_time, run, torchrun
from tests.support.left import assert_acted

DDP = str(ROOT / "configs" / "accelerate" / "ddp.yaml")
ZERO1 = str(ROOT / "configs" / "deepspeed" / "zero1.json")


def script(place: Path) -> str:
    """The console script, as an installer makes it from pyproject.toml."""
    entry = re.search(r'^structlora = "(.+):(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    path = place / "structlora"
    path.write_text(f"import sys\nfrom {entry[1]} import {entry[2]}\nsys.exit({entry[2]}())\n")
    return str(path)


def started(command: list[str], engine: str) -> None:
    done = run(command)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.count(f"StructLoRA on {engine}: ") == 1
    assert "it/s" not in done.stderr  # progress bars, which belong in a terminal
    assert_acted("out")


def test_console_script(place):
    started(
        [sys.executable, script(place), "--local_rank=0", "sft", "--config", config_file()],
        "torch, 1 process",
    )


@one_at_a_time
@pytest.mark.parametrize(
    ("in_file", "engine"),
    [
        ({}, "DDP, 2 processes"),
        pytest.param({"deepspeed": ZERO1}, "DeepSpeed ZeRO-1, 2 processes", marks=pytest.mark.slow),
    ],
    ids=["ddp", "deepspeed"],
)
def test_torchrun(in_file, engine, place):
    """Other launchers set the same variables (`tests/engines/test_launchers.py`)."""
    if "deepspeed" in in_file:
        pytest.importorskip("deepspeed")
    config = config_file(**in_file)
    started([*torchrun(2, "-m", "structlora_trl.cli"), "sft", "--config", config], engine)


LAUNCHES = {
    # name: (arguments of the launcher, in the file; on the command line; what runs)
    "one": ({}, ["--accelerate_config", "single_gpu"], "torch, 1 process"),
    "file": (
        {"accelerate_config": "multi_gpu", "num_processes": 4, "quiet": True},
        ["--num_processes=2"],
        "DDP, 2 processes",
    ),
    "zero2": ({"accelerate_config": "zero2"}, ["--num_processes", "2"], "DeepSpeed ZeRO-2, 2 processes"),
    "ours": ({}, ["--accelerate_config", DDP], "DDP, 2 processes"),
}


@one_at_a_time
@pytest.mark.parametrize(
    "name", [n if n == "one" else pytest.param(n, marks=pytest.mark.slow) for n in LAUNCHES]
)
def test_accelerate_config(name, place):
    """As `trl` has it: the command starts its own processes."""
    if name == "zero2":
        pytest.importorskip("deepspeed")
    in_file, words, engine = LAUNCHES[name]
    port = ["--main_process_port", str(free_port()), "--mixed_precision", "no"]
    started([sys.executable, script(place), "sft", "--config", config_file(**in_file), *words, *port], engine)


@pytest.mark.slow
def test_a_mistake_in_started_processes_is_an_exit_code(place):
    broken = config_file(dataset_name="missing.jsonl")
    done = run(
        [sys.executable, script(place), "sft", "--config", broken, "--accelerate_config", "single_gpu"]
    )
    assert done.returncode == 1 and "missing.jsonl" in done.stderr
    assert done.stderr.count("Traceback") == 0, done.stderr[-3000:]


def test_ctrl_c_ends_started_processes_without_a_traceback(place, monkeypatch, capsys):
    """As torch's agent passes it on. Its processes are interrupted too, and the first one says how to go on."""

    def interrupted(given):
        raise SignalException("Process got signal: 2", signal.SIGINT)

    monkeypatch.setattr(launch, "launch_command", interrupted)
    assert main(["sft", "--config", config_file(), "--num_processes", "2"]) == 130
    assert "Traceback" not in capsys.readouterr().err
