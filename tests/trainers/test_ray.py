"""Ray Train's TorchTrainer on two local workers: the callback acts, and the run resumes after a worker is killed."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from tests.support.jobs import sft
from tests.support.launching import ROOT, one_at_a_time

ray = pytest.importorskip("ray")


@pytest.mark.slow
@one_at_a_time
def test_resumes_after_a_worker_is_killed(tmp_path):
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from structlora_trl import StructLoRACallback
    from tests.support.ray_job import work

    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": environment})
    try:
        TorchTrainer(
            work,
            train_loop_config={"output": str(tmp_path)},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(
                storage_path=str(tmp_path / "ray"), failure_config=FailureConfig(max_failures=1)
            ),
        ).fit()
    finally:
        ray.shutdown()

    facts = json.loads((tmp_path / "facts.json").read_text())
    assert (tmp_path / "killed").exists() and facts["resumed"] and facts["step"] == 6
    assert facts["line"].startswith("StructLoRA on DDP, 2 processes")

    whole = tmp_path / "whole"  # one process on the same global batch, never interrupted
    sft(whole, [StructLoRACallback(gates="off")], max_steps=6, save_strategy="steps", save_steps=6).train()
    ours, theirs = (
        load_file(folder / "checkpoint-6" / "adapter_model.safetensors") for folder in (tmp_path, whole)
    )
    # AdamW divides tiny gradients by themselves: elements whose gradient is rounding move by a whole learning rate.
    apart = [(ours[name] - theirs[name]).abs().median().item() for name in theirs]
    assert max(apart) < 1e-4, apart
