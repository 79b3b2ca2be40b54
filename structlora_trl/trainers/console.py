"""What a training run says in its console: at the start, in each line of logs, and at the end."""

from __future__ import annotations

import shlex
from functools import partial

from peft import PeftModel
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import has_length

from ..runtime import Runtime
from .compat import passes_of

# The first three of these that a run has are printed; all metrics go to trackers and the trainer's state.
_SHOWN = ("effective_rank", "kept_share", "gradient_cosine", "stream_cosine", "drift_energy")
_PRINTED = 3
_PREFIX = "structlora/"


def start_lines(runtime: Runtime, trainer: Trainer, model: PeftModel, name: str) -> str:
    """What trains, on what, and what acts.

    Args:
        model (`PeftModel`): that is trained; `name` is its name inside the trainer's model, "" for itself.
    """
    state, args = trainer.state, trainer.args
    rows = (
        f"{len(trainer.train_dataset):,} rows" if has_length(trainer.train_dataset) else "rows as they come"
    )
    batch = state.train_batch_size * args.gradient_accumulation_steps * args.world_size
    share = passes_of(trainer)
    passes = "" if share is None else f", {share:.3g} passes over the rows"
    head, *acting = runtime.describe()
    where = f", in the PEFT model `{name}`" if name else ""
    lines = [
        f"{head}{where}",
        f"{rows}, batch of {batch}, {state.max_steps:,} steps{passes}",
        _trained(model),
        *acting,
    ]
    return "\n  ".join(lines)


def end_lines(runtime: Runtime, trainer: Trainer, model: PeftModel) -> str:
    """How the run ended, the adapter's size, and what can be done with it next."""
    state, folder = trainer.state, trainer.args.output_dir
    losses = [f"{state.global_step:,} steps"]
    for name, words in (("loss", "training loss"), ("eval_loss", "held-out loss")):
        found = [entry[name] for entry in state.log_history if name in entry]
        losses += [f"{words} {found[-1]:.4g}"] if found else []
    count, _ = model.get_nb_trainable_parameters()
    size = count * runtime.kinds[0].parameters[0].element_size()
    smaller = ["--prune"] if runtime.has_selected else ["--keep", "0.25", "--data", "ROWS.jsonl"]
    commands = (["inspect", folder], ["export", folder, "SMALL", *smaller])
    lines = [
        f"StructLoRA ends: {', '.join(losses)}",
        f"the adapter: {count:,} parameters, {_bytes(size)}, plain LoRA",
        "next, once it is saved: " + " or ".join(f"`{shlex.join(['structlora', *c])}`" for c in commands),
    ]
    return "\n  ".join(lines)


def log_briefly(trainer: Trainer) -> None:
    """Have what prints a trainer's logs show three of StructLoRA's metrics; trackers get them all."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, (PrinterCallback, ProgressCallback)):
            callback.on_log = partial(_print, callback)


def _print(printer: TrainerCallback, args, state, control, logs=None, **kwargs):
    ours = [f"{_PREFIX}{name}" for name in _SHOWN if f"{_PREFIX}{name}" in (logs or {})][:_PRINTED]
    brief = {name: x for name, x in (logs or {}).items() if not name.startswith(_PREFIX) or name in ours}
    return type(printer).on_log(printer, args, state, control, logs=brief, **kwargs)


def _trained(model: PeftModel) -> str:
    count, of = model.get_nb_trainable_parameters()
    return f"trains {count:,} of {of:,} parameters ({100 * count / of:.3g} %)"


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
