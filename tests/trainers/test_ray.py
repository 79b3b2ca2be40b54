"""Ray Train's TorchTrainer on two local workers: the callback acts, and the run resumes after a worker is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from structlora_trl import StructLoRACallback
from tests.support.jobs import sft
from tests.support.launching import ROOT, one_at_a_time

ray = pytest.importorskip("ray")
pytest.importorskip("ray.train")

SECONDS_TO_REGISTER = 8  # Ray's controller polls the workers for what they report


class Report(TrainerCallback):
    """Hands each checkpoint to Ray, as its guide for Transformers does; may kill its worker in the step after the first."""

    def __init__(self, kills: bool):
        self.kills = kills

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        checkpoint = ray.train.Checkpoint.from_directory(folder) if state.is_world_process_zero else None
        ray.train.report({"step": state.global_step}, checkpoint=checkpoint)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.kills and state.global_step == 3:
            time.sleep(SECONDS_TO_REGISTER)
            os.kill(os.getpid(), signal.SIGKILL)


def work(config: dict) -> None:
    """One worker."""
    out, checkpoint = Path(config["output"]), ray.train.get_checkpoint()
    rank = ray.train.get_context().get_world_rank()
    callback = StructLoRACallback(
        gates="off"
    )  # ranks draw apart, and the test compares them with one process
    report = Report(kills=checkpoint is None and rank == 1)
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    trainer = sft(out, [callback, report], **options)
    with contextlib.nullcontext() if checkpoint is None else checkpoint.as_directory() as folder:
        trainer.train(resume_from_checkpoint=folder)
    if rank == 0:
        assert checkpoint is not None and callback.runtime.step == 6
        (out / "line").write_text(repr(callback.runtime))


@pytest.mark.slow
@one_at_a_time
def test_resumes_after_a_worker_is_killed(tmp_path):
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": environment})
    failures = FailureConfig(max_failures=1)
    try:
        TorchTrainer(
            work,
            train_loop_config={"output": str(tmp_path)},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=str(tmp_path / "ray"), failure_config=failures),
        ).fit()
    finally:
        ray.shutdown()
    assert (tmp_path / "line").read_text().startswith("StructLoRA on DDP, 2 processes")

    whole = tmp_path / "whole"  # one process on the same global batch, never interrupted
    sft(whole, [StructLoRACallback(gates="off")], max_steps=6, save_strategy="steps", save_steps=6).train()
    ours, theirs = (
        load_file(folder / "checkpoint-6" / "adapter_model.safetensors") for folder in (tmp_path, whole)
    )
    # AdamW divides tiny gradients by themselves: elements whose gradient is rounding move by a whole learning rate.
    apart = [(ours[name] - theirs[name]).abs().median().item() for name in theirs]
    assert max(apart) < 1e-4, apart
