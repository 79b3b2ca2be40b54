"""A rank, a node or a link that dies: the job ends soon, and its last checkpoint goes on as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

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
MARGIN = 30  # seconds for a launcher to notice and to stop its other processes
CONSTANT = {**STEADY, "lr_scheduler_type": "constant"}
SAVING = {**CONSTANT, "save_strategy": "steps", "save_steps": 3}


def assert_goes_on(output, whole, engine):
    """The checkpoint of step 3 resumes and ends as the uninterrupted run does, bit for bit."""
    launch(output, engine, steps=6, resume=str(output / "checkpoint-3"), trainer=SAVING)
    assert_same(state(output), state(whole))


@pytest.mark.parametrize(
    "engine, place",
    [
        pytest.param(engine, place, marks=() if (engine, place) == ("zero2", "step") else slow)
        for engine in ("ddp", "fsdp2", "zero2", "zero3")
        for place in ("step", "save")
    ],
)
def test_killed_rank(engine, place, tmp_path):
    launch(tmp_path / "whole", engine, steps=6, trainer=SAVING)
    # Our file is written by rank 0. In the save after step 6, it is killed between writing and renaming.
    fault = {"rank": 0 if place == "save" else 1, "step": 5 if place == "save" else 4, "in": place}
    output = tmp_path / "parts"
    options = {"steps": 6, "trainer": SAVING, "kill": fault, "group_timeout": GROUP_TIMEOUT}
    done = run(torchrun(2) + job_arguments(output, engine, options), timeout=300)
    assert done.returncode != 0 and "SIGKILL" in done.stderr, done.stderr[-2000:]
    assert not (output / "checkpoint-6" / "structlora.safetensors").exists()
    assert_goes_on(output, tmp_path / "whole", engine)


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
        for node, name in enumerate(self.names):
            self.kill(node)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def cut(self):
        ip("-n", self.names[1], "link", "set", self.devices[1], "down")

    def kill(self, node: int):
        """Every process of the node at once, outright."""
        pids = subprocess.run(
            ["ip", "netns", "pids", self.names[node]], capture_output=True, text=True
        ).stdout.split()
        for pid in pids:
            os.kill(int(pid), signal.SIGKILL)

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


@slow
@pytest.mark.parametrize("fault", ["node killed", "link down"])
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_lost_node(engine, fault, nodes, tmp_path):
    launch(tmp_path / "whole", engine, steps=6, trainer=SAVING)
    output = tmp_path / "parts"
    options = {"steps": 1000, "trainer": SAVING, "group_timeout": GROUP_TIMEOUT}
    processes = nodes.start("torchrun", job_arguments(output, engine, options))
    deadline = time.monotonic() + 200
    while not (output / "checkpoint-6").exists() and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    if fault == "link down":
        nodes.cut()
        ending = processes
    else:
        nodes.kill(1)
        ending = processes[:1]
    struck = time.monotonic()
    for process in ending:
        process.communicate(timeout=GROUP_TIMEOUT + MARGIN)
        assert process.returncode != 0
    assert time.monotonic() - struck < GROUP_TIMEOUT + MARGIN
    assert_goes_on(output, tmp_path / "whole", engine)
