"""Every launcher and every launch configuration as it stands, with the callback as the script's only change."""

from __future__ import annotations

import pytest

from tests.support.launching import BIN, ROOT, facts_of, free_port, job_arguments, launch, one_at_a_time, run

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
