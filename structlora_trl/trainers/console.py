"""What a training run says in its console: at the start, in each line of logs, and at the end."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from functools import partial

from peft import PeftModel
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import has_length

from ..runtime import Runtime
from .compat import epochs_of

# The first three of these that a run has are printed; all metrics go to trackers and the trainer's state.
_SHOWN = ("gate_openness", "nats", "closed_share", "effective_rank", "gradient_cosine")
_PRINTED = 3
_PREFIX = "structlora/"


def start_lines(runtime: Runtime, trainer: Trainer, model: PeftModel, name: str) -> str:
    """What trains, on what, and what acts.

    Args:
        model (`PeftModel`): that is trained; `name` is its name inside the trainer's model, "" for itself.
    """
    head, *acting = runtime.describe()
    where = f", in the PEFT model `{name}`" if name else ""
    return _lines([f"{head}{where}", *_given(trainer, model), *acting])


def plain_start_lines(trainer: Trainer, model: PeftModel) -> str:
    """The same of a run without StructLoRA."""
    return _lines(["Plain LoRA (structlora: false)", *_given(trainer, model)])


def end_lines(
    name: str,
    trainer: Trainer,
    model: PeftModel,
    commands: Iterable[list[str]] = (),
    runtime: Runtime | None = None,
) -> str:
    """How the run ended, the adapter's size, and what can be done with it next.

    Args:
        name (`str`): what was trained.
        commands (`Iterable[list[str]]`, *optional*): that may come next.
        runtime (`Runtime`, *optional*): of a run with StructLoRA, whose selection is told.
    """
    state = trainer.state
    told = [f"{state.global_step:,} steps"]
    for key, words in (("loss", "training loss"), ("eval_loss", "held-out loss")):
        found = [entry for entry in state.log_history if key in entry and "step" in entry]
        if found:
            at = "" if found[-1]["step"] == state.global_step else f" (of step {found[-1]['step']})"
            told.append(f"{words} {found[-1][key]:.4g}{at}")
    best = state.best_global_step if trainer.args.load_best_model_at_end else None
    if loaded := [entry for entry in found[:-1] if entry["step"] == best]:
        last = told.pop().removeprefix("held-out loss ")
        told.append(
            f"held-out loss {loaded[-1]['eval_loss']:.4g} of the best checkpoint, step {best} (last: {last})"
        )
    elif found and (lowest := min(found, key=lambda entry: entry["eval_loss"])) is not found[-1]:
        remedy = "" if trainer.args.load_best_model_at_end else ", which `load_best_model_at_end` keeps"
        told[-1] += f" (lowest: {lowest['eval_loss']:.4g} after step {lowest['step']}{remedy})"
    count, _ = model.get_nb_trainable_parameters()
    width = next(p.element_size() for p in model.parameters() if p.requires_grad)
    following = " or ".join(f"`{shlex.join(['structlora', *words])}`" for words in commands)
    kept = [m.kept for m in runtime.maps] if runtime is not None and runtime.has_selected else []
    count_kept, directions = sum(int(x.sum()) for x in kept), sum(x.numel() for x in kept)
    smaller = f"{count_kept:,} of {directions:,} directions kept (`structlora export ADAPTER SMALL --prune` writes them alone)"
    gates = []
    if runtime is not None and runtime.gating.gates:
        figures = runtime.gating.metrics(runtime.openness())
        gates = [
            f"gates let {figures['nats']:,.0f} nats through: mean openness {figures['gate_openness']:.2f}, "
            f"{100 * figures['closed_share']:.0f} % of the directions closed"
        ]
    return _lines(
        [
            f"{name} ends: {', '.join(told)}",
            f"the adapter: {count:,} parameters, {_bytes(count * width)}, plain LoRA",
            *gates,
            *([smaller] if kept else []),
            *([f"next, once it is saved: {following}"] if following else []),
        ]
    )


def next_commands(runtime: Runtime, folder: str) -> list[list[str]]:
    """What can be done with an adapter in a folder."""
    by = [] if runtime.gating.gates else ["--data", "TRAINING_ROWS.jsonl"]
    smaller = ["--prune"] if runtime.has_selected else ["--keep", "0.25", *by]
    return [["inspect", folder], ["export", folder, f"{folder}-small", *smaller]]


def log_briefly(trainer: Trainer) -> None:
    """Have what prints a trainer's logs show three of StructLoRA's metrics; trackers get them all."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, (PrinterCallback, ProgressCallback)):
            callback.on_log = partial(_print, callback)


def _print(printer: TrainerCallback, args, state, control, logs=None, **kwargs):
    ours = [f"{_PREFIX}{name}" for name in _SHOWN if f"{_PREFIX}{name}" in (logs or {})][:_PRINTED]
    brief = {name: x for name, x in (logs or {}).items() if not name.startswith(_PREFIX) or name in ours}
    return type(printer).on_log(printer, args, state, control, logs=brief, **kwargs)


def _given(trainer: Trainer, model: PeftModel) -> list[str]:
    """Rows, batch, steps and epochs; parameters that are trained."""
    state, args = trainer.state, trainer.args
    is_known, held_out = has_length(trainer.train_dataset), trainer.eval_dataset
    rows = f"{len(trainer.train_dataset):,} rows" if is_known else "rows as they come"
    if args.eval_strategy != "no" and not isinstance(held_out, dict) and has_length(held_out):
        rows += f", {len(held_out):,} held out"
    batch = state.train_batch_size * args.gradient_accumulation_steps * args.world_size
    share = epochs_of(trainer)
    epochs = "" if share is None else f", {share:.3g} epoch{'' if share == 1 else 's'}"
    count, of = model.get_nb_trainable_parameters()
    rate = "" if args.learning_rate is None else f", learning rate {args.learning_rate:g}"
    return [
        f"{rows}, batch of {batch}, {state.max_steps:,} steps{epochs}",
        f"trains {count:,} of {of:,} parameters ({100 * count / of:.3g} %){rate}",
    ]


def _lines(lines: list[str]) -> str:
    return "\n  ".join(lines)


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
