"""The entry point: finds the command, and turns what a user can fix into one message without a traceback."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from .. import __version__
from ..errors import StructLoRAError

# Commands that run the script of TRL of the same name, and what they do.
TRAINING = {
    "sft": "supervised fine-tuning with TRL's SFTTrainer",
    "dpo": "preference optimisation with TRL's DPOTrainer",
    "kto": "preference optimisation on rows judged one by one, with TRL's KTOTrainer",
    "reward": "a reward model, with TRL's RewardTrainer",
    "grpo": "reinforcement learning from reward functions with TRL's GRPOTrainer",
    "rloo": "the same with TRL's RLOOTrainer",
}
# Commands that are modules of this package.
OTHERS = {
    "init": f"print a commented YAML file for one of {', '.join(TRAINING)}",
    "inspect": "what an adapter or checkpoint has learned, by module and depth",
    "export": "a plain LoRA adapter of a checkpoint; pruned or merged if asked",
}
TRACEBACK = "STRUCTLORA_TRACEBACK"
_DESCRIPTION = """Train LoRA adapters with StructLoRA (arXiv 2603.14228), look into them, and export them.

commands:
{commands}
"""
_EXAMPLES = f"""examples:
  structlora init > run.yaml                              # or `structlora init dpo`, kto, ...
  structlora sft --config run.yaml
  structlora sft --config run.yaml --structlora false --output_dir lora     # plain LoRA, all else equal
  structlora sft --config run.yaml --accelerate_config zero2
  torchrun --nproc_per_node 8 -m structlora_trl.cli sft --config run.yaml
  structlora inspect out
  structlora export out small --keep 0.25 --data rows.jsonl

`structlora COMMAND --help` says more. {TRACEBACK}=1 in the environment shows where an error comes from.
"""
_TRAINING_SCRIPT = "def main(script_args, training_args, model_args, dataset_args)"
# What a shell reports of a process that ended by the signals SIGINT and SIGPIPE.
INTERRUPTED, PIPE_CLOSED = 130, 141


def main(arguments: list[str] | None = None) -> int:
    """Run one command, that of the process where no arguments are given.

    Returns:
        `int`: the exit code: 0, 1, 2, 130 after Ctrl-C, or 141 where the reader of the output has closed it.
    """
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # as in `structlora inspect out | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return PIPE_CLOSED
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(arguments: list[str]) -> int:
    commands = {
        **TRAINING,
        **{name: f"TRL's script of this name, {name}.py" for name in _more_scripts()},
        **OTHERS,
    }
    parser = argparse.ArgumentParser(
        "structlora",
        usage="structlora COMMAND [options]",
        description=_DESCRIPTION.format(
            commands="\n".join(f"  {n:12} {what}" for n, what in commands.items())
        ),
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"structlora {__version__}")
    # The DeepSpeed launcher puts it before the script's own arguments; LOCAL_RANK in the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    try:
        given = parser.parse_args(arguments)
        if given.command is None:
            parser.print_help()
            return 2
        if given.command not in commands:
            near = difflib.get_close_matches(given.command, commands, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(commands)}"
            parser.error(f"unknown command '{given.command}'; {hint}")
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars fill a file; the lines they carry stay
        module = given.command if given.command in OTHERS else "train"
        if module == "train":
            from .early import check

            check(given.rest)  # before torch, which `train` imports
        import_module(f".{module}", __package__).run(given.command, given.rest)
    except SystemExit as stop:  # argparse: 0 after --help, 2 on a usage error
        return int(stop.code or 0)
    except StructLoRAError as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"structlora {given.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _more_scripts() -> list[str]:
    """Training scripts of the installed TRL that `TRAINING` does not describe; found without importing TRL."""
    spec = find_spec("trl")
    folders = spec.submodule_search_locations if spec else []
    files = [path for folder in folders for path in sorted(Path(folder, "scripts").glob("*.py"))]
    found = [path.stem for path in files if _TRAINING_SCRIPT in path.read_text(encoding="utf-8")]
    return [name for name in found if name not in TRAINING]
