"""What can be refused before torch is imported: a wrong path costs a second, and not twenty.

`check` looks at what stands in the YAML file and on the command line as it is; the functions that it calls are
called again with the arguments as TRL has read them.
"""

from __future__ import annotations

import argparse
import difflib
import glob
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from ..adapters.cells import refuse_cell
from ..errors import StructLoRAError, refuse_unwritable, refusing

# Names of PEFT, Transformers and this package, whose import takes seconds (`tests/cli/test_early.py`).
ADAPTER_CONFIG, MODEL_CONFIG, TRAINER_STATE = "adapter_config.json", "config.json", "trainer_state.json"
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
LOOKED_AT = 10_000  # rows whose cells are looked at, a second's work; of later ones, TRL says what is wrong
_PAIRS = (("chosen", "rejected"),)
# Script -> the columns that rows have, in one of these forms. A script that is not here is not checked.
_COLUMNS = {
    "sft": (("messages",), ("prompt", "completion"), ("conversations",)),
    "dpo": _PAIRS,
    "reward": _PAIRS,
    "kto": (("prompt", "completion", "label"), *_PAIRS),
    "grpo": (("prompt",),),
    "rloo": (("prompt",),),
}
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
    "num_train_epochs": (_above_zero, "a number of passes above 0"),
    "seed": (lambda v: v is not None, "a number"),
    "lora_r": (_above_zero, "a rank of 1 or more"),
    "lora_alpha": (_above_zero, "a number above 0, since updates are scaled by `lora_alpha / lora_r`"),
    "lora_dropout": (lambda v: 0 <= v < 1, "a probability of 0 or more and below 1"),
    "test_split_size": (lambda v: v is None or 0 < v < 1, "a share of the rows above 0 and below 1"),
}


def check(arguments: list[str]) -> None:
    """Look at the file and the paths that a training command is given.

    Args:
        arguments (`list[str]`): what stands after the command.

    Raises:
        StructLoRAError: a YAML file that cannot be read; a number out of range; a model, data or a checkpoint that is not there; an
            output folder that holds another run.
    """
    if {"-h", "--help"} & {*arguments}:
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("config", "max_steps", *_PATHS, *NUMBERS):
        parser.add_argument(f"--{name}")
    parser.add_argument("--overwrite", nargs="?", const="true")
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
    model, output = given.get("model_name_or_path"), given.get("output_dir")
    if isinstance(model, str):
        refuse_missing_model(model)
    parts = given.get("datasets") or given.get("dataset_name")
    for part in parts if isinstance(parts, list) else [parts]:
        name = part.get("path") if isinstance(part, dict) else part
        if isinstance(name, str) and name:
            local_data(name)
    if isinstance(output, str):
        checkpoint = last_checkpoint(given.get("resume_from_checkpoint"), output)
        refuse_earlier_run(Path(output), checkpoint, is_true(given.get("overwrite")))


def _is_negative(word: str) -> bool:
    try:
        return float(word) < 0
    except ValueError:
        return False


def refuse_numbers(given: dict) -> None:
    """Stop at a number that trains nothing. What is no number, TRL's parser tells.

    Raises:
        StructLoRAError: it names the argument.
    """
    steps = str(given.get("max_steps"))
    if steps.isdigit() and int(steps) > 0:  # which Trainer counts then, and not passes
        given = {name: value for name, value in given.items() if name != "num_train_epochs"}
    for name, (accepts, meaning) in NUMBERS.items():
        value = given.get(name)
        try:
            is_wrong = name in given and not accepts(float(value) if isinstance(value, str) else value)
        except (TypeError, ValueError):
            continue
        if is_wrong:
            raise StructLoRAError(f"{name}={value}", meaning, f"correct `{name}`")


def form_of(command: str, found: list[str] | None, text: str = "text") -> tuple[str, ...] | None:
    """The columns that a command trains on, of those found; None where they are not checked.

    Args:
        text (`str`, *optional*): of SFT, `dataset_text_field`.

    Raises:
        StructLoRAError: columns that the command does not take.
    """
    accepted = _COLUMNS.get(command, ()) + (((text,),) if command == "sft" else ())
    if (
        not found or not accepted or any(column.endswith("_ids") for column in found)
    ):  # the last are tokenized
        return None
    form = next((columns for columns in accepted if {*columns} <= {*found}), None)
    if form is None:
        raise StructLoRAError(
            f"the columns {', '.join(found)} in the data",
            "the columns " + "; or ".join(", ".join(columns) for columns in accepted),
            "rename the columns, or choose the command for data of this form",
        )
    return form


def refuse_cells(form: tuple[str, ...], rows: Iterable[dict], where: str) -> None:
    """Stop at the first cell of these columns that cannot be trained on.

    Raises:
        StructLoRAError: it names row and column.
    """
    for number, row in enumerate(rows, 1):
        for column in form:
            if column != "label":  # KTO's, true or false
                refuse_cell(row.get(column), number, column, where)


def nearest(name: str) -> str:
    """The nearest name beside a path that is not there, in words."""
    path = Path(name).expanduser()
    if path.exists() or not path.parent.is_dir():
        return ""
    beside = [other.name for other in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, beside, 1)
    return f" (did you mean {'' if path.is_absolute() else './'}{path.parent / near[0]}?)" if near else ""


def if_offline(*names: str) -> str:
    """In words, where the environment keeps the hub out of reach, and one of the names is of no local path."""
    is_set = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if not is_set or all(os.path.exists(name) for name in names):
        return ""
    return "; HF_HUB_OFFLINE is set, so that nothing is fetched from the hub: unset it"


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


def refuse_missing_model(name: str) -> str:
    """Look at the folder of a base model; other names are the hub's.

    Returns:
        `str`: the name, with `~` written out.

    Raises:
        StructLoRAError: no folder there, or one of an adapter.
    """
    path = os.path.expanduser(name)
    if not path.startswith((".", "/")):
        return name
    if not os.path.isdir(path):
        raise StructLoRAError(
            f"no folder {path}", "a model to adapt", f"correct `model_name_or_path`{nearest(path)}"
        )
    if os.path.isfile(f"{path}/{ADAPTER_CONFIG}") and not os.path.isfile(f"{path}/{MODEL_CONFIG}"):
        raise StructLoRAError(
            f"an adapter in {path}",
            "a whole model, to which a new adapter is added",
            f"merge it (`structlora export {path} MERGED --merge`) and train on MERGED; or continue its run with "
            "`resume_from_checkpoint`",
        )
    return path


def local_data(name: str, files: Any = None) -> tuple[str, Any]:
    """What `load_dataset` calls a local file: its builder and its path. Other names stay.

    Raises:
        StructLoRAError: no such file or folder, or an empty file.
    """
    builder = BUILDERS.get(Path(name).suffix)
    if builder is None and not name.startswith((".", "/", "~")):
        return name, files
    path = os.path.expanduser(name)
    if not os.path.exists(path):
        what = "file" if builder else "folder"
        raise StructLoRAError(
            f"no {what} {path}",
            "rows, one example each",
            f"correct the path{nearest(path)}, or make the file",
        )
    if builder is None or not os.path.isfile(path):
        return path, files
    with open(path, "rb") as file:
        if not file.read(4096).strip():
            raise StructLoRAError(
                f"{path} empty", "rows, one example each", "write the rows, or correct the path"
            )
    return builder, glob.escape(path)  # `datasets` takes paths for patterns


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
    asked = str(asked)
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
