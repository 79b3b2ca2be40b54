"""A rank that dies: the job ends soon, and its last checkpoint goes on as if nothing had happened. Two nodes are one run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess

import pytest

from tests.support.launching import (
    BIN,
    ENVIRONMENT,
    ROOT,
    STEADY,
    facts_of,
    job_arguments,
    largest_difference,
    launch,
    one_at_a_time,
    run,
    state,
    torchrun,
    trained,
)
from tests.support.tiny import assert_same

pytestmark = one_at_a_time
slow = pytest.mark.slow

GROUP_TIMEOUT = 15  # seconds; a rank that waits for a dead one gives up by then
CONSTANT = {**STEADY, "lr_scheduler_type": "constant"}
SAVING = {**CONSTANT, "save_strategy": "steps", "save_steps": 3}


@pytest.mark.parametrize(
    "engine", ["zero2", *(pytest.param(engine, marks=slow) for engine in ("ddp", "fsdp2", "zero3"))]
)
def test_killed_rank(engine, tmp_path):
    """The others end when the group's time is over. A kill within a save: `trainers/test_trainers.py`."""
    launch(tmp_path / "whole", engine, steps=6, trainer=SAVING)
    output = tmp_path / "parts"
    options = {"steps": 6, "trainer": SAVING, "kill_at": 4, "group_timeout": GROUP_TIMEOUT}
    done = run(torchrun(2) + job_arguments(output, engine, options), timeout=300)
    assert done.returncode != 0 and "SIGKILL" in done.stderr, done.stderr[-2000:]
    launch(output, engine, steps=6, resume=str(output / "checkpoint-3"), trainer=SAVING)
    assert_same(state(output), state(tmp_path / "whole"))


class Nodes:
    """Two network namespaces on one machine, joined by one link."""

    def __init__(self, name: str):
        self.names = [f"{name}-{node}" for node in (0, 1)]
        self.devices = [f"sl{os.getpid()}n{node}" for node in (0, 1)]
        self.addresses = ["10.203.0.1", "10.203.0.2"]

    def __enter__(self):
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.devices[0], "type", "veth", "peer", "name", self.devices[1])
        for name, device, address in zip(self.names, self.devices, self.addresses, strict=True):
            ip("link", "set", device, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            for up in (device, "lo"):
                ip("-n", name, "link", "set", up, "up")
        return self

    def __exit__(self, *_):
        for name in self.names:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in pids.stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def start(self, launcher: str, job: list[str]) -> list[subprocess.Popen]:
        """The launch script of configs/two_nodes on both nodes, each in a process group of its own."""
        processes = []
        for node, (name, device) in enumerate(zip(self.names, self.devices, strict=True)):
            environment = {
                **ENVIRONMENT,
                "PATH": f"{BIN}:{os.environ['PATH']}",
                "NODE_RANK": str(node),
                "MASTER_ADDR": self.addresses[0],
                "PROCESSES_PER_NODE": "1",
                "GLOO_SOCKET_IFNAME": device,
            }
            command = [
                "ip",
                "netns",
                "exec",
                name,
                str(ROOT / "configs" / "two_nodes" / f"{launcher}.sh"),
                *job,
            ]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, **pipes))
        return processes


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes():
    if shutil.which("ip") is None:
        pytest.skip("no `ip` command (iproute2)")
    try:
        with Nodes(f"structlora-{os.getpid()}") as both:
            yield both
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")


@slow
@pytest.mark.parametrize(
    "launcher, engine", [("torchrun", "ddp"), ("accelerate", "zero2"), ("deepspeed", "zero3")]
)
def test_two_nodes_train_as_one_process(launcher, engine, nodes, tmp_path):
    options = {"steps": 6, "trainer": CONSTANT}
    launch(tmp_path / "one", **options)
    job = job_arguments(tmp_path / "two", "launcher" if launcher == "accelerate" else engine, options)
    processes = nodes.start(launcher, job)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert processes[1].returncode == 0, outputs[1][-3000:]
    facts_of(subprocess.CompletedProcess(job, processes[0].returncode, outputs[0], ""), engine, 2)
    assert largest_difference(trained(tmp_path / "one"), trained(tmp_path / "two")) <= 1e-5
