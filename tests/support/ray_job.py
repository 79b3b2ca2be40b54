"""One worker of a Ray Train job: TRL's SFT with the callback, checkpoints reported to Ray, and one worker that dies once."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import ray.train
from ray.train import Checkpoint
from transformers import TrainerCallback

from structlora_trl import StructLoRACallback
from tests.support.jobs import sft

SECONDS_TO_REGISTER = 8  # Ray's controller polls the workers for what they report


class Report(TrainerCallback):
    """Hands each checkpoint to Ray, as its guide for Transformers does; kills rank 1 outright in the step after the first."""

    def __init__(self, mark: Path):
        self.mark = mark

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        checkpoint = Checkpoint.from_directory(folder) if state.is_world_process_zero else None
        ray.train.report({"step": state.global_step}, checkpoint=checkpoint)

    def on_step_begin(self, args, state, control, **kwargs):
        is_victim = ray.train.get_context().get_world_rank() == 1 and state.global_step == 3
        if is_victim and not self.mark.exists():
            self.mark.touch()
            time.sleep(SECONDS_TO_REGISTER)
            os.kill(os.getpid(), signal.SIGKILL)


def work(config: dict) -> None:
    out = Path(config["output"])
    callback = StructLoRACallback(
        gates="off"
    )  # ranks draw apart, and the test compares them with one process
    callbacks = [callback, Report(out / "killed")]
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    trainer = sft(out, callbacks, **options)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        trainer.train()
    else:
        with checkpoint.as_directory() as folder:
            trainer.train(resume_from_checkpoint=folder)
    if ray.train.get_context().get_world_rank() == 0:
        facts = {
            "line": repr(callback.runtime),
            "resumed": checkpoint is not None,
            "step": callback.runtime.step,
        }
        (out / "facts.json").write_text(json.dumps(facts))
