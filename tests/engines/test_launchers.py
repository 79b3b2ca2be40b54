"""Every launcher and every launch configuration as it stands, with the callback as the script's only change."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.support.launching import (
    BIN,
    ENVIRONMENT,
    ROOT,
    STEADY,
    facts_of,
    free_port,
    job_arguments,
    largest_difference,
    launch,
    one_at_a_time,
    run,
    trained,
)

pytestmark = one_at_a_time
slow = pytest.mark.slow

ACCELERATE = sorted(path.stem for path in (ROOT / "configs" / "accelerate").glob("*.yaml"))


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("one"), steps=3)["losses"]


def check(command, engine, losses):
    facts = facts_of(run(command, cwd=ROOT), engine, 2)
    assert facts["losses"] == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("name", [n if n == "zero2" else pytest.param(n, marks=slow) for n in ACCELERATE])
def test_accelerate_launch(name, tmp_path, losses):
    job_arguments(tmp_path, name, {})  # skips where DeepSpeed is needed and absent
    config = ["--config_file", f"configs/accelerate/{name}.yaml", "--main_process_port", str(free_port())]
    job = job_arguments(tmp_path, "launcher", {"steps": 3})
    check([str(BIN / "accelerate"), "launch", *config, *job], name, losses)


@pytest.mark.parametrize("name", [pytest.param(n, marks=slow) for n in ("zero2", "zero3_offload")])
def test_deepspeed_launcher(name, tmp_path, losses):
    start = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    check([*start, *job_arguments(tmp_path, name, {"steps": 3})], name, losses)


@slow
@pytest.mark.parametrize(
    "launcher, engine", [("torchrun", "ddp"), ("accelerate", "zero2"), ("deepspeed", "zero3")]
)
def test_two_nodes_train_as_one_process(launcher, engine, tmp_path, one_process):
    """The scripts of configs/two_nodes, here with both nodes on one machine."""
    options = {"steps": 6, "trainer": {**STEADY, "lr_scheduler_type": "constant"}}
    job = job_arguments(tmp_path, "launcher" if launcher == "accelerate" else engine, options)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PROCESSES_PER_NODE": "1"}
    variables |= {**ENVIRONMENT, "PATH": f"{BIN}:{os.environ['PATH']}"}
    command = [str(ROOT / "configs" / "two_nodes" / f"{launcher}.sh"), *job]
    pipes = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    nodes = [subprocess.Popen(command, env={**variables, "NODE_RANK": node}, **pipes) for node in "01"]
    first, second = (node.communicate(timeout=300)[0] for node in nodes)
    assert nodes[1].returncode == 0, second[-3000:]
    facts_of(subprocess.CompletedProcess(command, nodes[0].returncode, first, ""), engine, 2)
    assert largest_difference(trained(one_process(**options)), trained(tmp_path)) <= 1e-5
