"""What depends on the insides or the versions of other libraries, in one place."""

from __future__ import annotations

import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod, wraps
from importlib import import_module
from types import ModuleType

import numpy
import torch
import transformers
from packaging.version import Version
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_callback import CallbackHandler, TrainerCallback
from transformers.trainer_utils import has_length

from ..errors import StructLoRAError

# How names end of trainers that train on samples of their own policy and compare its probabilities with those
# it had then. By name, since importing one of TRL's imports its dependencies, and Unsloth's
# UnslothGRPOTrainer does not derive from GRPOTrainer.
_ON_POLICY = (
    "A2POTrainer",
    "DistillationTrainer",
    "GKDTrainer",
    "GOLDTrainer",
    "GRPOTrainer",
    "IWOPDTrainer",
    "OnlineDPOTrainer",
    "PPOTrainer",
    "RLOOTrainer",
    "SDFTTrainer",
    "SDPOTrainer",
)
_COUNTED_ROWS = 64  # whose labels tell how many a row has
_IGNORED = -100  # a label that is left out of the loss
# Of those that switch dropout off, also where no argument says so (LLaMA-Factory's).
_WITHOUT_DROPOUT = ("DPOTrainer", "KTOTrainer")


def calling_trainer() -> tuple[Trainer, str | None]:
    """The Trainer that is calling a callback, and the checkpoint that it resumes from.

    Trainer hands callbacks its model and optimizer, but neither itself nor `resume_from_checkpoint`
    (transformers 5.24; `upstream/transformers-callbacks-see-the-trainer.md`). Both stand in the frame of the
    method that called us, whatever its name: Unsloth's training loop is `_fast_inner_training_loop`.

    Raises:
        StructLoRAError: no Trainer is calling.
    """
    trainer, frame = None, sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if trainer is None and isinstance(caller, Trainer):
            trainer = caller
        if caller is trainer is not None and "resume_from_checkpoint" in frame.f_locals:
            return trainer, frame.f_locals["resume_from_checkpoint"]
        frame = frame.f_back
    if trainer is None:
        raise StructLoRAError(
            "the callback used outside a `transformers.Trainer`",
            "a Trainer or a TRL trainer in training",
            "use `structlora_trl.attach(model, optimizer)` in custom loops",
        )
    return trainer, None


def when_train_breaks_off(trainer: Trainer, end: Callable[[], None]) -> None:
    """Have something done where `trainer.train` raises, of which no callback hears (transformers 5.24;
    `upstream/transformers-train-that-breaks-off.md`).
    """
    train = trainer.train

    @wraps(train)
    def watched(*args, **kwargs):
        try:
            return train(*args, **kwargs)
        except BaseException:
            end()
            raise

    trainer.train = watched


def refuse_engine_taken_down(trainer: Trainer) -> None:
    """Stop where a second `train()` under DeepSpeed has destroyed the first's engine and goes on without.

    `train` begins with `Accelerator.free_memory`, which destroys the engine, and finds its model wrapped
    already (transformers 5.6 to 5.24; `upstream/transformers-second-train-under-deepspeed.md`). A plain LoRA
    run fails in its first backward.

    Raises:
        StructLoRAError: there is no engine.
    """
    if trainer.is_deepspeed_enabled and trainer.accelerator.deepspeed_engine_wrapped is None:
        raise StructLoRAError(
            "a second `train()` under DeepSpeed, whose engine Trainer took down when it began",
            "an engine to train with",
            "set `trainer.model_wrapped = trainer.model` before it (at ZeRO-3, with gradient checkpointing off)",
        )


def why_quiet(trainer: Trainer) -> str | None:
    """Return why gates, which are a kind of dropout, are off in a trainer; None where they are on."""
    name, classes = type(trainer).__name__, [c.__name__ for c in type(trainer).__mro__]
    if any(c.endswith(_ON_POLICY) for c in classes):
        return f"{name} trains on samples of its own policy"
    if getattr(trainer.args, "disable_dropout", any(c.endswith(_WITHOUT_DROPOUT) for c in classes)):
        return f"{name} switches dropout off"
    return None


def data_of(trainer: Trainer) -> tuple[float, float]:
    """Return how many labels the training data of a trainer has, the terms that its loss is a mean of over an epoch, and how
    many an optimizer step sees. Of a stream, those of the run's steps.
    """
    state, args, loader = trainer.state, trainer.args, trainer.callback_handler.train_dataloader
    steps = _steps_of_epoch(trainer)
    if steps is None:
        batch = state.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return float(state.max_steps * batch), float(batch)
    labels = trainer.num_examples(loader) * _labels_of_row(loader)
    return labels, labels / steps


def _labels_of_row(loader: DataLoader) -> float:
    """Return the mean number of labels in a row of the data, by a few rows: 1 of a classifier, the tokens that count of a
    language model. 1 where rows cannot be told apart, as those of a stream.
    """
    python, array = random.getstate(), numpy.random.get_state()
    try:
        count = min(_COUNTED_ROWS, len(loader.dataset))
        places = [i * len(loader.dataset) // count for i in range(count)]
        rows = [loader.dataset[place] for place in places]
        if all(isinstance(row.get("labels"), list) for row in rows):  # tokenised rows, of any collator
            return sum(label != _IGNORED for row in rows for label in row["labels"]) / count
        with torch.random.fork_rng(devices=[]):  # collators may draw, and the run's own draws are to stay
            labels = loader.collate_fn(rows)["labels"]
        is_sequence = labels.ndim > 1 and not labels.is_floating_point()
        return float((labels != _IGNORED).sum()) / count if is_sequence else 1.0
    except Exception:  # of data sets and collators of all kinds: an estimate of the price must not end a run
        return 1.0
    finally:
        random.setstate(python), numpy.random.set_state(array)


def epochs_of(trainer: Trainer) -> float | None:
    """Return the epochs that a trainer is about to make; None where rows are streamed."""
    steps = _steps_of_epoch(trainer)
    return None if steps is None else trainer.state.max_steps / steps


def _steps_of_epoch(trainer: Trainer) -> int | None:
    loader = trainer.callback_handler.train_dataloader
    if not has_length(loader) or not len(loader):
        return None
    # The last step of an epoch takes what is left of it.
    return math.ceil(len(loader) / trainer.args.gradient_accumulation_steps)


def run_first(handler: CallbackHandler, callback: TrainerCallback) -> None:
    """Move a callback to the front of a handler, safe while the handler goes through its list.

    User callbacks run after the reporting ones; what they add to `logs` would miss TensorBoard, W&B and
    trackio (transformers 5.24; `upstream/transformers-callback-order.md`).
    """
    handler.callbacks.remove(callback)
    handler.callbacks.insert(0, callback)


def trl_script(name: str) -> ModuleType:
    """The module `trl.scripts.<name>`.

    Raises:
        ImportError: TRL before 1.0 cannot import some of its own trainers beside transformers 5, and says
            RuntimeError; its KTOTrainer can be imported, and fails when it is built.
    """
    import trl

    if name == "kto" and Version(trl.__version__) < Version("1.0"):
        raise ImportError(
            f"TRL {trl.__version__}'s KTOTrainer sets `warnings_issued`, which transformers 5 dropped"
        )
    # TRL's own default and PEFT use the old names, of which transformers warns in each run (TRL 1.15, transformers 5.24).
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    try:
        return import_module(f"trl.scripts.{name}")
    except RuntimeError as error:
        versions = f"TRL {trl.__version__} beside transformers {transformers.__version__}"
        raise ImportError(f"{versions}: {error}") from error


@contextmanager
def resuming(checkpoint: str | None) -> Iterator[None]:
    """Have `Trainer.train()` resume from a checkpoint where its caller says nothing.

    TRL's scripts hand `resume_from_checkpoint` to the trainer since TRL 1.15; before, they ignored it.
    """
    import trl

    if checkpoint is None or Version(trl.__version__) >= Version("1.15"):
        yield
        return
    train = Trainer.train
    Trainer.train = partialmethod(train, resume_from_checkpoint=checkpoint)
    try:
        yield
    finally:
        Trainer.train = train
