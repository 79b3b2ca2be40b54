"""Processes for a training command, through Accelerate's launcher: `--accelerate_config`, as `trl` has it."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import resources
from pathlib import Path

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..errors import StructLoRAError, refusing
from .main import INTERRUPTED


def launch_parser() -> argparse.ArgumentParser:
    """The parser of `accelerate launch`, with `--accelerate_config` beside its own arguments."""
    parser = launch_command_parser()
    parser.add_argument("--accelerate_config")
    return parser


def words_of(file: dict, parser: argparse.ArgumentParser) -> list[str]:
    """The keys of a YAML file that are the launcher's, as words of a command line."""
    words = []
    for action in parser._actions:
        for flag in action.option_strings:
            if action.nargs != 0 and file.get(flag[2:]) is not None:
                words += [flag, str(file[flag[2:]])]
            elif file.get(flag[2:]):
                words.append(flag)
    return words


def launch(words: list[str], command: list[str]) -> None:
    """Run a command of this package in processes that Accelerate starts.

    Args:
        words (`list[str]`): arguments of `launch_parser`; the last one of a name wins.
        command (`list[str]`): the command and its arguments. The started processes ignore the launcher's
            among them.

    Raises:
        StructLoRAError: an `accelerate_config` that there is not, or arguments that do not go together.
        SystemExit: a process failed, and has said why; or after Ctrl-C.
    """
    given = launch_parser().parse_args([*words, "--module", __package__, *command])
    if given.accelerate_config is not None:
        given.config_file = _path(given.accelerate_config)
    try:
        with refusing(
            "starting the processes",
            "arguments of `accelerate launch` that go together",
            "correct the one it names",
        ):
            launch_command(given)
    except (ChildFailedError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    except SignalException:  # torch's agent was interrupted; the first process has said how to go on
        raise SystemExit(INTERRUPTED) from None


def _path(config: str) -> str:
    """A file of Accelerate's, or the one that TRL has under this name; without `fsdp1`, which no engine serves."""
    if Path(config).is_file():
        return config
    bundled = resources.files("trl") / "accelerate_configs"
    found = {Path(entry.name).stem for entry in bundled.iterdir() if entry.name.endswith(".yaml")}
    names = sorted(found - {"fsdp1"})
    if config not in names:
        raise StructLoRAError(
            f"accelerate_config={config!r}, neither a file nor a name of TRL's that StructLoRA trains with",
            f"a file that `accelerate config` writes, or one of {', '.join(names)}",
            "correct `accelerate_config`",
        )
    return str(bundled / f"{config}.yaml")
