"""What depends on the insides or the versions of other libraries, in one place."""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import Trainer
from transformers.trainer_callback import CallbackHandler, TrainerCallback

from .errors import StructLoRAError


def _trainer_frame(function: str):
    """The innermost running call of a Trainer's method of that name, or None."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == function and isinstance(frame.f_locals.get("self"), Trainer):
            return frame
        frame = frame.f_back
    return None


def training_trainer() -> tuple[Trainer, str | None]:
    """The Trainer whose training loop is running, and the checkpoint it resumes from.

    Trainer hands callbacks neither itself nor `resume_from_checkpoint` (transformers 5), though it hands them
    model and optimizer; both stand in the frame of the loop that called us.

    Raises:
        StructLoRAError: no Trainer is training.
    """
    frame = _trainer_frame("_inner_training_loop")
    if frame is None:
        raise StructLoRAError(
            "the callback used outside a `transformers.Trainer`",
            "a Trainer or a TRL trainer in training",
            "use `structlora_trl.attach(model, optimizer)` in custom loops",
        )
    return frame.f_locals["self"], frame.f_locals["resume_from_checkpoint"]


def checkpoint_being_saved() -> Path | None:
    """The directory of the checkpoint the Trainer is writing right now, or None."""
    frame = _trainer_frame("_save_checkpoint")
    return None if frame is None else Path(frame.f_locals["output_dir"])


def run_first(handler: CallbackHandler, callback: TrainerCallback) -> None:
    """Move a callback to the front of a handler, safe while the handler goes through its list.

    User callbacks run after the reporting ones; what they add to `logs` would miss TensorBoard, W&B and trackio.
    """
    handler.callbacks.remove(callback)
    handler.callbacks.insert(0, callback)
