"""The entry point: finds the command, and turns what a user can fix into one message without a traceback."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from importlib import import_module

from ..errors import StructLoRAError

# command -> (module of this package with a `run(command, arguments)`, what it does)
COMMANDS = {
    "sft": ("train", "supervised fine-tuning with TRL's SFTTrainer"),
    "dpo": ("train", "preference optimisation with TRL's DPOTrainer"),
    "kto": ("train", "preference optimisation on rows judged one by one, with TRL's KTOTrainer"),
    "reward": ("train", "a reward model, with TRL's RewardTrainer"),
    "grpo": ("train", "reinforcement learning from reward functions with TRL's GRPOTrainer"),
    "rloo": ("train", "the same with TRL's RLOOTrainer"),
    "init": ("init", "print a commented YAML file for one of the above"),
    "inspect": ("inspect", "what an adapter or checkpoint has learned, by module and depth"),
    "export": ("export", "a plain LoRA adapter of a checkpoint; pruned or merged if asked"),
}
TRACEBACK = "STRUCTLORA_TRACEBACK"
_DESCRIPTION = """Train LoRA adapters with StructLoRA (arXiv 2603.14228), look into them, and export them.

commands:
{commands}
"""
_EXAMPLES = f"""examples:
  structlora init dpo > run.yaml
  structlora sft --config run.yaml
  structlora sft --config run.yaml --structlora false     # plain LoRA, all else equal
  structlora sft --config run.yaml --accelerate_config zero2
  torchrun --nproc_per_node 8 -m structlora_trl.cli sft --config run.yaml
  structlora inspect out
  structlora export out adapter --prune 0.05

`structlora COMMAND --help` says more. {TRACEBACK}=1 in the environment shows where an error comes from.
"""
# The DeepSpeed launcher puts it before the script's own arguments; LOCAL_RANK in the environment says the same.
_LOCAL_RANK = re.compile(r"--local[_-]rank(=.*)?")


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments (`list[str]`, *optional*): those of the process where omitted.

    Returns:
        `int`: the exit code: 0, 1 or 2.
    """
    parser = argparse.ArgumentParser(
        "structlora",
        usage="structlora COMMAND [options]",
        description=_DESCRIPTION.format(
            commands="\n".join(f"  {name:8} {what}" for name, (_, what) in COMMANDS.items())
        ),
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    try:
        given = parser.parse_args(_without_local_rank(sys.argv[1:] if arguments is None else arguments))
        if given.command is None:
            parser.print_help()
            return 2
        if given.command not in COMMANDS:
            near = difflib.get_close_matches(given.command, COMMANDS, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(COMMANDS)}"
            parser.error(f"unknown command '{given.command}'; {hint}")
        import_module(f".{COMMANDS[given.command][0]}", __package__).run(given.command, given.rest)
    except SystemExit as stop:  # argparse: 0 after --help, 2 on a usage error
        return int(stop.code or 0)
    except StructLoRAError as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"structlora {given.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _without_local_rank(arguments: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        match = _LOCAL_RANK.fullmatch(argument)
        if not match and not skip:
            kept.append(argument)
        skip = bool(match) and match[1] is None
    return kept
