"""Local data in the form that TRL's scripts load, and checks of it before the model is loaded."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.arrow_writer import SchemaInferenceError
from datasets.exceptions import DatasetGenerationError, DatasetsError
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset
from trl.scripts.utils import DatasetConfig

from ..errors import StructLoRAError, refusing
from .early import BUILDERS, local_data

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


def as_mixture(script: ScriptArguments, mixture: DatasetMixtureConfig) -> None:
    """Write local files, and data that `test_split_size` splits, as the mixtures that TRL's scripts load.

    Raises:
        StructLoRAError: no data, a path that does not exist, or an empty file.
    """
    is_streamed = mixture.streaming if mixture.datasets else script.dataset_streaming
    if mixture.test_split_size is not None and is_streamed:
        raise StructLoRAError(
            "`test_split_size` and streamed rows, whose number is not known",
            "one of them",
            "give the rows for evaluation a split or a file of their own, or remove `dataset_streaming`",
        )
    if mixture.datasets:
        mixture.datasets = _parts(mixture.datasets)
        for part in mixture.datasets:
            part.path, part.data_files = local_data(part.path, part.data_files)
        return
    if not isinstance(script.dataset_name or "", str):
        raise StructLoRAError(
            f"dataset_name={script.dataset_name!r}",
            "one name or path",
            "write `dataset_name: rows.jsonl`; several stand under `datasets`",
        )
    if not script.dataset_name:
        raise StructLoRAError(
            "neither `dataset_name` nor `datasets`",
            "one of them",
            "set `dataset_name` to a file, a folder or a data set of the hub, or list several under `datasets` "
            "(`- path: rows.jsonl`)",
        )
    path, files = local_data(script.dataset_name, None)
    if files is None and mixture.test_split_size is None:
        script.dataset_name = path
        return
    part = DatasetConfig(path, script.dataset_config, data_files=files, split=script.dataset_train_split)
    mixture.datasets, mixture.streaming = [part], script.dataset_streaming
    script.dataset_name, script.dataset_train_split = None, "train"  # as a mixture names its rows
    if mixture.test_split_size is not None:
        script.dataset_test_split = "test"


def check(name: str, script: ScriptArguments, mixture: DatasetMixtureConfig, training) -> None:
    """Load what `as_mixture` wrote, as the script will (then from the cache), and look at splits and columns.

    Raises:
        StructLoRAError: files that cannot be read, a missing split, or columns that the script does not take.
    """
    with refusing(
        "loading the data",
        "files or a data set that `datasets` reads",
        "correct `dataset_name` or `datasets`: files or a folder, or a data set of the hub that can be reached",
        also=(AttributeError, DatasetsError),  # AttributeError: streamed rows have no split
    ):
        try:
            if mixture.datasets:
                splits = get_dataset(mixture)
                # As the files have them: the split draws rows anew.
                whole = (
                    get_dataset(dataclasses.replace(mixture, test_split_size=None))
                    if mixture.test_split_size
                    else splits
                )
            else:
                splits = datasets.load_dataset(
                    script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming
                )
                whole = splits
        # A JSON file without a row: the first from datasets 5, the second before.
        except (StopIteration, DatasetGenerationError) as error:
            if not isinstance(error, StopIteration) and not isinstance(error.__cause__, SchemaInferenceError):
                raise
            raise StructLoRAError(
                f"a file without rows in {', '.join(sources(script, mixture))}",
                "rows in each file",
                "remove the empty file, or write its rows",
            ) from error
    rows = _split(splits, script.dataset_train_split, "dataset_train_split")
    if training.eval_strategy != "no":
        _split(splits, script.dataset_test_split, "dataset_test_split")
    found, accepted = rows.column_names, _COLUMNS.get(name, ())
    if name == "sft":
        accepted = (*accepted, (training.dataset_text_field,))
    is_tokenized = any(column.endswith("_ids") for column in found or ())
    if not found or not accepted or is_tokenized:
        return
    form = next((columns for columns in accepted if {*columns} <= {*found}), None)
    if form is None:
        raise StructLoRAError(
            f"the columns {', '.join(found)} in the data",
            "the columns " + "; or ".join(", ".join(columns) for columns in accepted),
            "rename the columns, or choose the command for data of this form",
        )
    for name, part in whole.items():
        if isinstance(part, datasets.Dataset) and part.column_names == found:
            where = f"split '{name}' of " if len(whole) > 1 else ""
            _check_cells(part, form, where + ", ".join(sources(script, mixture)))


def _check_cells(rows: datasets.Dataset, columns: tuple[str, ...], where: str) -> None:
    """Stop at the first cell that is neither text nor a list of messages.

    Args:
        rows (`Dataset`): in the order of the file.
        columns (`tuple[str]`): those that the script reads.
        where (`str`): what the rows are called, for the message.

    Raises:
        StructLoRAError: it names row (from 1) and column.
    """
    for column in columns:
        if column == "label":  # KTO's, true or false
            continue
        cells = rows.data.column(column)
        if _are_text(cells) or _are_messages(cells):
            continue
        for number, cell in enumerate(rows[column], 1):
            if found := _what_is_wrong(cell):
                raise StructLoRAError(
                    f"{found} in row {number}, column `{column}`, of {where}",
                    "text, or a list of messages with `role` and `content`",
                    "correct or remove the row; a number that is meant as text stands in quotation marks, in a .jsonl file "
                    '(`"4"`), since a .csv file cannot tell the two apart',
                )


def _are_text(cells: pa.ChunkedArray) -> bool:
    """Whether all cells are text, told without looking at each."""
    return not cells.null_count and (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type))


def _are_messages(cells: pa.ChunkedArray) -> bool:
    """Whether all cells are lists of messages with a role and a content, told without looking at each."""
    if cells.null_count or not (pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type)):
        return False
    message = cells.type.value_type
    if not pa.types.is_struct(message) or {"role", "content"} - {field.name for field in message}:
        return False
    if cells.length() and pc.min(pc.list_value_length(cells)).as_py() == 0:
        return False
    contents = pc.struct_field(pc.list_flatten(cells), "content")
    return not contents.null_count and not pa.types.is_null(contents.type)


def _what_is_wrong(cell: Any) -> str | None:
    """What a cell is, in words, where it is neither text nor messages."""
    if isinstance(cell, str):
        return None
    if cell is None:
        return "nothing (null)"
    if isinstance(cell, (bool, int, float)):
        return f"the number {cell!r}" if not isinstance(cell, bool) else f"{cell!r}"
    if not isinstance(cell, list):
        return f"a {type(cell).__name__}"
    if not cell:
        return "an empty list"
    for message in cell:
        if not isinstance(message, dict):
            return f"a list with {message!r}"
        if "from" in message:  # ShareGPT's form, which TRL rewrites
            continue
        # A message that calls tools may have no content.
        if message.get("role") is None or (message.get("content") is None and not message.get("tool_calls")):
            return f"a message without `{'role' if message.get('role') is None else 'content'}`"
    return None


def _parts(given) -> list[DatasetConfig]:
    """The entries under `datasets`; a name or a path alone is one, too."""
    entries = given if isinstance(given, list) else [given]
    with refusing(
        "reading `datasets`",
        "a list of names, paths or entries such as `- path: rows.jsonl`",
        "correct the entry",
    ):
        entries = [{"path": entry} if isinstance(entry, str) else entry for entry in entries]
        parts = [DatasetConfig(**entry) if isinstance(entry, dict) else entry for entry in entries]
    odd = [part for part in parts if not isinstance(part, DatasetConfig)]
    if odd:
        raise StructLoRAError(
            f"{odd[0]!r} under `datasets`", "a name, a path or `path: rows.jsonl`", "correct the entry"
        )
    return parts


def sources(script: ScriptArguments, mixture: DatasetMixtureConfig) -> list[str]:
    """Where the rows are read from: the files that are named, else the folders and data sets."""
    found = []
    for part in mixture.datasets:
        files = part.data_files or part.path
        files = files if isinstance(files, list) else [str(files)]
        found += [re.sub(r"\[([*?\[])\]", r"\1", file) for file in files]  # what `glob.escape` did
    return found or [script.dataset_name]


def held_out(script: ScriptArguments, mixture: DatasetMixtureConfig, training) -> dict | None:
    """Where the rows are that a run evaluates on, for `adapters.rows`, after `as_mixture`; None where it does not."""
    if training.eval_strategy == "no":
        return None
    if not mixture.datasets:
        path = (
            os.path.abspath(script.dataset_name)
            if os.path.exists(script.dataset_name)
            else script.dataset_name
        )
        return {"path": path, "name": script.dataset_config, "split": script.dataset_test_split}
    parts = [dataclasses.asdict(part) for part in mixture.datasets]
    for part in parts:
        if isinstance(part["data_files"], str) and part["path"] in BUILDERS.values():
            part["data_files"] = os.path.abspath(part["data_files"])
    return {
        "datasets": parts,
        "test_split_size": mixture.test_split_size,
        "split": script.dataset_test_split,
        "seed": training.seed,
    }


def _split(splits, name: str, argument: str):
    if name not in splits:
        raise StructLoRAError(
            f"no split '{name}' in the data (it has {', '.join(map(repr, splits))})",
            f"the split that `{argument}` names",
            f"set `{argument}`; for evaluation, `test_split_size: 0.1` sets rows apart, and `eval_strategy: 'no'` "
            "needs none",
        )
    return splits[name]
