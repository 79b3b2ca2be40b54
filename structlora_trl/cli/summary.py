"""What a training command says before the first step and after the last: a few short lines each."""

from __future__ import annotations

import shlex
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import Trainer

from ..adapters.inspecting import final_losses
from .arguments import Arguments, without
from .data import sources

_ONLINE = ("grpo", "rloo")  # which make their own completions, and log a reward in place of a held-out loss


def at_start(trainer: Trainer) -> str:
    """Rows, batch, steps, passes and trainable parameters of a run, one or two lines.

    Args:
        trainer (`Trainer`): with its model and optimizer ready.
    """
    args, steps = trainer.args, trainer.state.max_steps
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    parts = [f"{steps:,} steps", f"batch {batch}"]
    rows = _length(trainer.train_dataset)
    if rows is not None:
        parts.insert(0, f"{rows:,} rows")
        per_pass = _length(trainer.callback_handler.train_dataloader)
        if per_pass:
            parts.append(f"{steps * args.gradient_accumulation_steps / per_pass:.3g} passes over the rows")
    held_out = _length(trainer.eval_dataset) if args.eval_strategy != "no" else None
    parts.append("nothing held out" if held_out is None else f"{held_out:,} rows held out")
    # ZeRO-3 leaves parameters empty, and knows their size.
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in trainer.model.parameters()]
    trainable, total = sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)
    return (
        f"{', '.join(parts)}.\n{trainable:,} of {total:,} parameters are trained ({trainable / total:.2%}), at a learning "
        f"rate of {args.learning_rate:g}."
    )


def at_end(command: str, arguments: list[str], given: Arguments, history: list[dict]) -> str:
    """Losses, size of the adapter and the commands that may come next.

    Args:
        command (`str`): the training command.
        arguments (`list[str]`): what stood after it.
        given (`Arguments`): the same, read.
        history (`list[dict]`): the Trainer's log.
    """
    output = given.training.output_dir
    train, held_out = final_losses(history)
    losses = [] if train is None else [f"training loss {train:.4g}"]
    if held_out is not None:
        losses.append(f"held-out loss {held_out:.4g}")
        lowest = min((e for e in history if "eval_loss" in e), key=lambda e: e["eval_loss"])
        if lowest["eval_loss"] < held_out:
            losses[-1] += f" (lowest: {lowest['eval_loss']:.4g} after step {lowest['step']})"
    lines = [f"Last {', '.join(losses)}."] if losses else []
    weights = Path(output) / SAFETENSORS_WEIGHTS_NAME
    size = f" of {weights.stat().st_size / 1e6:.3g} MB" if weights.is_file() else ""
    lines.append(f"{output}: an adapter{size}. It is plain LoRA, which PEFT loads without this package.")
    rows = sources(given.script, given.mixture)[0]
    following = [(["structlora", "inspect", output, "--html", "report.html"], "what each layer learned")]
    if command not in _ONLINE and given.model.lora_r > 1:
        rank = str(max(1, given.model.lora_r // 4))
        following.append(
            (
                ["structlora", "export", output, f"{output}-small", "--rank", rank, "--data", rows],
                "a smaller adapter",
            )
        )
    if given.structlora is not None:
        again = without(arguments, "output_dir", "overwrite", "resume_from_checkpoint")
        again = ["structlora", command, *again, "--structlora", "false", "--output_dir", f"{output}-lora"]
        following.append((again, "plain LoRA, all else equal"))
    return "\n".join([*lines, "Next:", *(f"  {shlex.join(words)}   # {what}" for words, what in following)])


def _length(rows) -> int | None:
    """Number of rows; of several sets, of all; None where it is not known, as of streamed rows."""
    if isinstance(rows, dict):
        lengths = [_length(part) for part in rows.values()]
        return None if None in lengths else sum(lengths)
    try:
        return len(rows)
    except TypeError:
        return None
