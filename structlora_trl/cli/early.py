"""What can be refused before torch is imported: a wrong path costs a second, and not twenty.

`check` looks at what stands in the YAML file and on the command line as it is; the functions that it calls are
called again with the arguments as TRL has read them.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from ..config import StructLoRAConfig
from ..errors import StructLoRAError, nearest, refuse_unwritable, refusing
from ..yaml_block import PREFIX, read_over
from .local_rows import local_data, look_at

# Names of PEFT, Transformers and this package, whose import takes seconds (`tests/cli/test_early.py`).
ADAPTER_CONFIG, MODEL_CONFIG, TRAINER_STATE = "adapter_config.json", "config.json", "trainer_state.json"
_PATHS = ("model_name_or_path", "dataset_name", "output_dir", "resume_from_checkpoint")


def _above_zero(value) -> bool:
    return 0 < value < math.inf


# Argument -> which values it takes, and the words for them. Other libraries meet these in the middle of a set-up, or not at all.
NUMBERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{
        name: (lambda v: (v or 0) >= 1, "1 or more")
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        )
    },
    "learning_rate": (_above_zero, "a number above 0"),
    "weight_decay": (lambda v: 0 <= v < math.inf, "a number of 0 or more"),
    "num_train_epochs": (_above_zero, "a number of epochs above 0"),
    "seed": (lambda v: v is not None and 0 <= v < 2**32, "a number from 0 to 2**32 - 1"),
    "lora_r": (_above_zero, "a rank of 1 or more"),
    "lora_alpha": (_above_zero, "a number above 0, since updates are scaled by `lora_alpha / lora_r`"),
    "lora_dropout": (lambda v: 0 <= v < 1, "a probability of 0 or more and below 1"),
    "test_split_size": (lambda v: v is None or 0 < v < 1, "a share of the rows above 0 and below 1"),
}


def check(command: str, arguments: list[str]) -> None:
    """Look at the file and the paths that a training command is given, and at StructLoRA's options.

    Args:
        command (`str`): the training command.
        arguments (`list[str]`): what stands after it.

    Raises:
        StructLoRAError: a YAML file that cannot be read; a number out of range; an option that is refused; no model, or a
            model, data or a checkpoint that is not there; rows of a local file that the command does not take; an output
            folder that holds another run.
    """
    if {"-h", "--help"} & {*arguments}:
        return
    options = [PREFIX + option.name for option in fields(StructLoRAConfig)]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("config", "max_steps", "dataset_text_field", *_PATHS, *NUMBERS):
        parser.add_argument(*{f"--{name}", f"--{name.replace('_', '-')}"}, dest=name)
    for name in options:
        parser.add_argument(f"--{name}", type=yaml_value, default=argparse.SUPPRESS)
    for name in ("overwrite", "structlora"):
        parser.add_argument(f"--{name}", nargs="?", type=yaml_value, const=True, default=argparse.SUPPRESS)
    joined: list[str] = []
    for word in arguments:  # argparse takes -2e-4 for an option
        if joined and _is_negative(word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    try:
        words = vars(parser.parse_known_args(joined)[0])
    except argparse.ArgumentError:
        return  # a name without its value, which TRL's parser tells with its usage
    path = words.pop("config")
    file = {} if path is None else read_yaml(path)
    given = {**file, **{name: value for name, value in words.items() if value is not None}}
    refuse_numbers(given)
    block = words.get("structlora", file.get("structlora", True))
    read_over(block, {name: words[name] for name in options if name in words})
    # Without a model, TRL's parser first tells a name that is misspelt; of the command alone it would say "no GPU".
    if "model_name_or_path" in given or not arguments:
        refuse_missing_model(given.get("model_name_or_path"))
    parts = given.get("datasets") or given.get("dataset_name")
    for part in parts if isinstance(parts, list) else [parts]:
        is_entry = isinstance(part, dict)
        name = part.get("path") if is_entry else part
        if isinstance(name, str) and name:
            if is_entry:  # which may choose columns
                local_data(name)
            else:
                look_at(name, command, given.get("dataset_text_field", "text"))
    output = given.get("output_dir")
    if isinstance(output, str):
        output = os.path.expanduser(output)  # as `TrainingArguments` does
        checkpoint = last_checkpoint(given.get("resume_from_checkpoint"), output)
        refuse_earlier_run(Path(output), checkpoint, is_true(given.get("overwrite")))


def _is_negative(word: str) -> bool:
    try:
        return float(word) < 0
    except ValueError:
        return False


def refuse_numbers(given: dict) -> None:
    """Stop at a number that trains nothing, or at a word in its place.

    Raises:
        StructLoRAError: it names the argument.
    """
    steps = str(given.get("max_steps"))
    if steps.isdigit() and int(steps) > 0:  # which Trainer counts then, and not epochs
        given = {name: value for name, value in given.items() if name != "num_train_epochs"}
    for name, (accepts, meaning) in NUMBERS.items():
        value = given.get(name)
        try:
            is_wrong = name in given and not accepts(float(value) if isinstance(value, str) else value)
        except ValueError:  # a word
            is_wrong = True
        except TypeError:  # nothing, or a list
            continue
        if is_wrong:
            raise StructLoRAError(f"{name}={value}", meaning, f"correct `{name}`")


def if_offline(*names: str) -> str:
    """In words, where the environment keeps the hub out of reach, and one of the names is of no local path."""
    is_set = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if not is_set or all(os.path.exists(name) for name in names):
        return ""
    return "; HF_HUB_OFFLINE is set, so that nothing is fetched from the hub: unset it"


def yaml_value(text: str) -> Any:
    """A word of the command line as the YAML file would have it."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not YAML") from error


def read_yaml(path: str) -> dict:
    """The keys and values of a YAML file.

    Raises:
        StructLoRAError: no such file, or no YAML in it: with line and column.
    """
    expected = "a YAML file of arguments"
    with refusing(f"reading {path}", expected, "correct the path after `--config`"):
        text = Path(path).read_text(encoding="utf-8")
    try:
        options = yaml.safe_load(text)
    except yaml.YAMLError as error:
        lines, what = text.splitlines(), getattr(error, "problem", None) or error
        # Where something is never closed, the problem is met at the end of the file; the context is where it began.
        marks = (getattr(error, name, None) for name in ("problem_mark", "context_mark"))
        mark = next((mark for mark in marks if mark and mark.line < len(lines)), None)
        where = f"line {mark.line + 1}, column {mark.column + 1} of {path}" if mark else path
        shown = [line.strip() for line in lines[max(mark.line - 1, 0) : mark.line + 1]] if mark else []
        raise StructLoRAError(
            f"no YAML in {where} ({' '.join(str(what).split())}): {' / '.join(f'`{line}`' for line in shown)}",
            expected,
            "correct that line, or the one before it: `key: value`, two spaces of indentation and no tabs, each bracket "
            "and quotation mark closed",
        ) from error
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
    if not path.startswith((".", "/")):
        return name
    if not os.path.isdir(path):
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
    """The checkpoints of a folder that were written to their end, the oldest first."""
    found = (file.parent for file in output.glob(f"checkpoint-*/{TRAINER_STATE}"))  # written last
    found = [path for path in found if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def last_checkpoint(asked: str | bool | None, output: str) -> str | None:
    """The checkpoint that `resume_from_checkpoint` asks for: a path, or with 'true' the last whole one of
    `output_dir`; None where the run starts anew.

    Raises:
        StructLoRAError: there is none, or its writing was cut short.
    """
    asked = os.path.expanduser(str(asked))
    if asked.lower() in ("false", "none", ""):
        return None
    whole = whole_checkpoints(Path(output))
    if asked.lower() == "true":
        if whole:
            return str(whole[-1])
        where, remedy = f"in {output}", "correct `output_dir`"
    else:
        if (Path(asked) / TRAINER_STATE).is_file():
            return asked
        where = f"at {asked}"
        remedy = f"set `resume_from_checkpoint: {whole[-1]}`" if whole else "correct the path"
    raise StructLoRAError(
        f"no whole checkpoint {where}",
        f"a folder with {TRAINER_STATE}, which Trainer writes last",
        f"{remedy}, or remove `resume_from_checkpoint` to start over",
    )


def refuse_earlier_run(output: Path, checkpoint: str | None, overwrite: bool) -> None:
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


def is_true(value: Any) -> bool:
    """Whether a switch is on, as a file or a command line has it."""
    return value is True or str(value).lower() == "true"
