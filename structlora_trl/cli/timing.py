"""The time of a training step, measured before the run."""

from __future__ import annotations

import contextlib
import io
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from . import train

_STEPS = 3  # the first one, which allocates, is not timed


class _Stopwatch(TrainerCallback):
    """Ends a run after three steps."""

    def __init__(self):
        self.ends, self.planned = [], 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.planned = state.max_steps

    def on_step_end(self, args, state, control, **kwargs):
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.ends.append(time.perf_counter())
        control.should_training_stop = state.global_step >= _STEPS


def has_accelerator() -> bool:
    """Return whether training here runs on something that is faster than the CPU."""
    return torch.accelerator.is_available()


def measure(command: str, text: str) -> str:
    """Run the first three steps of a training file, save nothing, and return a comment line: what the run will take.

    Args:
        command (`str`): the training command.
        text (`str`): YAML, of the file.

    Raises:
        StructLoRAError: the command refuses the file.
    """
    watch = _Stopwatch()
    before = list(DEFAULT_CALLBACKS)
    with TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        file = Path(folder, "run.yaml")
        file.write_text(text, encoding="utf-8")
        nothing = {"eval_strategy": "no", "save_strategy": "no", "report_to": "none"}
        words = [word for name, value in nothing.items() for word in (f"--{name}", value)]
        DEFAULT_CALLBACKS.append(watch)
        try:
            train.run(command, ["--config", str(file), "--output_dir", str(Path(folder, "out")), *words])
        finally:
            DEFAULT_CALLBACKS[:] = before
    if len(watch.ends) < 2:
        return f"# {watch.planned} steps, too few to measure their time\n"
    seconds = (watch.ends[-1] - watch.ends[0]) / (len(watch.ends) - 1)
    total = _duration(seconds * watch.planned)
    return f"# {seconds:.2g} s a step here: about {total} for {watch.planned:,} steps, without evaluation\n"


def _duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
