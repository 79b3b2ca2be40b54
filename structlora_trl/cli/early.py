"""What can be refused before torch is imported: a wrong path costs a second, and not twenty."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from ..config import StructLoRAConfig
from ..errors import StructLoRAError, nearest, refuse_unwritable, refusing
from ..local_data import local_path
from ..yaml_block import PREFIX, read_over

# Names of PEFT, Transformers and this package, whose import takes seconds (`tests/cli/test_early.py`).
ADAPTER_CONFIG, MODEL_CONFIG, TRAINER_STATE = "adapter_config.json", "config.json", "trainer_state.json"
_LOOKED_AT = ("config", "model_name_or_path", "dataset_name", "output_dir", "resume_from_checkpoint")


def check(arguments: list[str]) -> None:
    """Look at the file and the paths that a training command is given, and at StructLoRA's options.

    Args:
        arguments (`list[str]`): what stands after the command.

    Raises:
        StructLoRAError: a YAML file that cannot be read; an option that is refused; no model, or a model, data or a
            checkpoint that is not there; an output folder that holds another run.
    """
    if {"-h", "--help"} & {*arguments}:
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in _LOOKED_AT:
        parser.add_argument(*{f"--{name}", f"--{name.replace('_', '-')}"}, dest=name)
    add_own_arguments(parser)
    try:
        path = parser.parse_known_args(arguments)[0].config
        parser.set_defaults(**({} if path is None else read_yaml(path)))
        given = vars(parser.parse_known_args(arguments)[0])
    except argparse.ArgumentError:
        return  # a name without its value, which TRL's parser tells with its usage
    read_own(given)
    # Without a model, TRL's parser first tells a name that is misspelt.
    if given["model_name_or_path"] is not None or not arguments:
        refuse_missing_model(given["model_name_or_path"])
    parts = given.get("datasets") or given["dataset_name"]
    for part in parts if isinstance(parts, list) else [parts]:
        name = part.get("path") if isinstance(part, dict) else part
        if isinstance(name, str):
            local_path(name)
    if isinstance(given["output_dir"], str):
        output = os.path.expanduser(given["output_dir"])  # as `TrainingArguments` does
        checkpoint = last_checkpoint(given["resume_from_checkpoint"], output)
        _refuse_earlier_run(Path(output), checkpoint, given["overwrite"])


def add_own_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a training command has beside TRL's arguments."""
    switch = {"nargs": "?", "type": _yaml_value, "const": True}
    output = "Write over the adapter that `output_dir` holds, and remove its checkpoints."
    parser.add_argument("--overwrite", **switch, default=False, help=output)
    group = parser.add_argument_group("StructLoRA")
    train = "Train StructLoRA. 'false' trains plain LoRA, with all else equal."
    group.add_argument("--structlora", **switch, default=True, help=train)
    for option in fields(StructLoRAConfig):
        text = f"{option.metadata['help']} (default: {option.default})".replace("%", "%%")
        flag = f"--{PREFIX}{option.name}"
        group.add_argument(flag, type=_yaml_value, metavar="VALUE", default=argparse.SUPPRESS, help=text)


def read_own(given: dict) -> StructLoRAConfig | None:
    """Return the options under `structlora`, with those of the command line over them; None for plain LoRA."""
    return read_over(given["structlora"], {n: value for n, value in given.items() if n.startswith(PREFIX)})


def _yaml_value(text: str) -> Any:
    """A word of the command line as the YAML file would have it."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not YAML") from error


def read_yaml(path: str) -> dict:
    """Return the keys and values of a YAML file.

    Raises:
        StructLoRAError: no such file, or no YAML in it: with line and column.
    """
    remedy = "correct the path after `--config`, or the line: `key: value`, two spaces of indentation and no tabs, each "
    remedy += "bracket and quotation mark closed"
    with refusing(f"reading {path}", "a YAML file of arguments", remedy, also=(yaml.YAMLError,)):
        with open(path, encoding="utf-8") as file:
            options = yaml.safe_load(file)
    if not isinstance(options, dict):
        raise StructLoRAError(f"{path} without keys", "lines of `key: value`", "write one argument a line")
    return options


def refuse_missing_model(name: object, argument: str = "model_name_or_path") -> str:
    """Look at the folder of a base model; other names are the hub's.

    Args:
        name (`str`): what is given as the model.
        argument (`str`, *optional*): by which it is given.

    Returns:
        `str`: the name, with `~` written out.

    Raises:
        StructLoRAError: no name, no folder there, or one of an adapter.
    """
    if not isinstance(name, str) or not name:
        raise StructLoRAError(
            f"no model (`{argument}` is {name!r})",
            "a base model",
            f"set `{argument}` to a folder or to a model of the hub",
        )
    path = os.path.expanduser(name)
    if path.startswith((".", "/")) and not os.path.isdir(path):
        raise StructLoRAError(f"no folder {path}", "a base model", f"correct `{argument}`{nearest(path)}")
    if os.path.isfile(f"{path}/{ADAPTER_CONFIG}") and not os.path.isfile(f"{path}/{MODEL_CONFIG}"):
        raise StructLoRAError(
            f"an adapter in {path}",
            "a whole model, to which an adapter is added",
            f"merge it (`structlora export {path} MERGED --merge`) and give MERGED; to continue its run, "
            "`resume_from_checkpoint`",
        )
    return path


def whole_checkpoints(output: Path) -> list[Path]:
    """Return the checkpoints of a folder that were written to their end, the oldest first."""
    found = (file.parent for file in output.glob(f"checkpoint-*/{TRAINER_STATE}"))  # written last
    found = [path for path in found if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def last_checkpoint(asked: str | bool | None, output: str) -> str | None:
    """Return the checkpoint that `resume_from_checkpoint` asks for: a path, or with 'true' the last whole one of
    `output_dir`; None where the run starts anew.

    Raises:
        StructLoRAError: there is none, or its writing was cut short.
    """
    asked = os.path.expanduser(str(asked))
    if asked.lower() in ("false", "none", ""):
        return None
    whole = whole_checkpoints(Path(output))
    if asked.lower() == "true" and whole:
        return str(whole[-1])
    if (Path(asked) / TRAINER_STATE).is_file():
        return asked
    last = f"set `resume_from_checkpoint: {whole[-1]}`" if whole else "correct the path or `output_dir`"
    raise StructLoRAError(
        f"no whole checkpoint {f'in {output}' if asked.lower() == 'true' else f'at {asked}'}",
        f"a folder with {TRAINER_STATE}, which Trainer writes last",
        f"{last}, or remove `resume_from_checkpoint` to start over",
    )


def _refuse_earlier_run(output: Path, checkpoint: str | None, overwrite: Any) -> None:
    """Stop where an output folder cannot be written, or holds a run that is neither continued nor given up.

    Raises:
        StructLoRAError: the message names the folder.
    """
    refuse_unwritable(output)
    has_run = (output / ADAPTER_CONFIG).exists() or whole_checkpoints(output)
    if has_run and not overwrite and not checkpoint:
        raise StructLoRAError(
            f"an adapter or checkpoints of an earlier run in output_dir={output}",
            "a new folder, so that nothing is lost",
            "choose another `output_dir`; or give `--resume_from_checkpoint true` to continue that run, or `--overwrite`",
        )
