"""What may come after a training command."""

from __future__ import annotations

import shlex

from .arguments import Arguments, without
from .data import sources

_ONLINE = ("grpo", "rloo")  # which make their own completions: their rows say nothing about a loss


def next_commands(command: str, arguments: list[str], given: Arguments) -> str:
    """Commands to look into the adapter, to make it smaller, and to train plain LoRA beside it, one a line.

    Args:
        command (`str`): the training command.
        arguments (`list[str]`): what stood after it.
        given (`Arguments`): the same, read.
    """
    output, rank = given.training.output_dir, given.model.lora_r
    lines = ["Next:"]

    def add(words: list[str], what: str) -> None:
        lines.append(f"  {shlex.join(['structlora', *words])}   # {what}")

    add(["inspect", output, "--html", "report.html"], "what each layer learned")
    if command not in _ONLINE and rank > 1:
        rows = sources(given.script, given.mixture)[0]
        smaller = ["--rank", str(max(1, rank // 4)), "--data", rows]
        add(["export", output, f"{output}-small", *smaller], "a smaller adapter")
    if given.structlora is not None:
        again = without(arguments, "output_dir", "overwrite", "resume_from_checkpoint")
        plain = ["--structlora", "false", "--output_dir", f"{output}-lora"]
        add([command, *again, *plain], "plain LoRA, all else equal")
    return "\n".join(lines)
