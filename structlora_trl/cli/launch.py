"""Processes for a training command, through Accelerate's launcher: `--accelerate_config`, as `trl` has it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..errors import StructLoRAError
from ..refusing import refusing

CONFIG = "accelerate_config"
# Each launcher sets one of them in the processes that it starts.
_IN_STARTED_PROCESSES = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")


class LaunchArguments:
    """The arguments of `accelerate launch`, and `accelerate_config`, among those of a training command.

    Args:
        known (`set[str]`): flags that the training command has itself; it keeps them.
    """

    def __init__(self, known: set[str]):
        # name -> whether a value follows it
        self._takes_value = {CONFIG: True}
        for action in launch_command_parser()._actions:
            for flag in action.option_strings:
                if flag.startswith("--") and flag not in known:
                    self._takes_value[flag[2:]] = action.nargs != 0

    @property
    def names(self) -> set[str]:
        """Without dashes: what stands after `--`, and may be a key of the YAML file."""
        return {*self._takes_value}

    def split(self, arguments: list[str]) -> tuple[list[str], list[str]]:
        """A command line without the launcher's arguments, and these."""
        kept, taken, rest = [], [], iter(arguments)
        for argument in rest:
            name, given, value = argument.removeprefix("--").partition("=")
            if not argument.startswith("--") or name not in self._takes_value:
                kept.append(argument)
            elif not self._takes_value[name]:
                taken.append(argument)
            else:
                value = value if given else next(rest, None)
                if value is None:
                    raise StructLoRAError(
                        f"--{name} without a value", "one after it", "write it, or remove the argument"
                    )
                taken += [f"--{name}", value]
        return kept, taken

    def of_file(self, file: dict) -> list[str]:
        """Those that are keys of a YAML file, as words of a command line."""
        words = []
        for name in file:
            if name not in self._takes_value:
                continue
            if self._takes_value[name]:
                words += [f"--{name}", str(file[name])]
            elif file[name]:
                words.append(f"--{name}")
        return words


def is_started() -> bool:
    """Whether a launcher started this process, so that it is to train."""
    return any(name in os.environ for name in _IN_STARTED_PROCESSES)


def launch(launcher: list[str], command: list[str]) -> None:
    """Run a command of this package in processes that Accelerate starts.

    Args:
        launcher (`list[str]`): arguments of `accelerate launch`; the last one of a name wins.
        command (`list[str]`): the command and its arguments.

    Raises:
        StructLoRAError: an `accelerate_config` that there is not, or arguments that do not go together.
        SystemExit: a process failed; it has said why.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{CONFIG}")
    ours, theirs = parser.parse_known_args(launcher)
    if ours.accelerate_config is not None:
        theirs = ["--config_file", _path(ours.accelerate_config), *theirs]
    given = launch_command_parser().parse_args([*theirs, "--module", __package__, *command])
    try:
        with refusing(
            "starting the processes", "arguments of `accelerate launch` that go together", "correct the one it names"
        ):
            launch_command(given)
    except (ChildFailedError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None


def _path(config: str) -> str:
    """A file of Accelerate's, or the one that TRL has under this name."""
    if Path(config).is_file():
        return config
    bundled = resources.files("trl") / "accelerate_configs"
    names = sorted(Path(entry.name).stem for entry in bundled.iterdir() if entry.name.endswith(".yaml"))
    if config not in names:
        raise StructLoRAError(
            f"accelerate_config={config!r}, neither a file nor a name that TRL has",
            f"a file that `accelerate config` writes, or one of {', '.join(names)}",
            "correct `accelerate_config`",
        )
    return str(bundled / f"{config}.yaml")
