"""Rows of a file, a folder or a data set of the hub, before a trainer or a tool reads them.

Which format a file has, `datasets` finds out. Here are the mistakes that people make: a path that leads nowhere, an empty file,
columns and cells that cannot be trained on. `datasets` is imported only to count rows, since that takes a second.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from .errors import StructLoRAError, nearest, refusing

# A name that ends so is one of a file, whether or not the file exists. Files with other endings are read where they exist.
_ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gz")
_PAIRS = ("chosen", "rejected")
# Command -> the sets of columns that it trains on; for SFT, also the column that `dataset_text_field` names.
_COLUMNS = {
    "sft": (("messages",), ("prompt", "completion"), ("conversations",)),
    "dpo": (_PAIRS,),
    "reward": (_PAIRS,),
    "kto": (("prompt", "completion", "label"), _PAIRS),
    "grpo": (("prompt",),),
    "rloo": (("prompt",),),
}
_LOOKED_AT = 10_000  # rows whose cells are looked at, a second's work


def local_path(name: str) -> Path | None:
    """Return the file or folder of a name; None for a data set of the hub.

    Raises:
        StructLoRAError: there is none at this path, or the file is empty.
    """
    path = Path(name).expanduser()
    is_file = name.lower().endswith(_ENDINGS)
    if not path.exists() and (is_file or name.startswith((".", "/", "~"))):
        raise StructLoRAError(
            f"no {'file' if is_file else 'folder'} {path}",
            "rows, one example each",
            f"correct the path{nearest(str(path))}, or make the file",
        )
    if path.is_file() and not path.stat().st_size:
        raise StructLoRAError(
            f"{path} empty", "rows, one example each", "write the rows, or correct the path"
        )
    return path if path.exists() else None


def load_arguments(name: str) -> dict[str, str]:
    """Return how `datasets.load_dataset` is told of a name: a file by its folder, so that it finds the format.

    Raises:
        StructLoRAError: as `local_path`.
    """
    path = local_path(name)
    if path is None or path.is_dir():
        return {"path": str(path or name)}
    path = path.absolute()
    return {"path": str(path.parent), "data_files": glob.escape(str(path))}  # taken for a pattern


def check_rows(command: str, rows, source: str, text: str = "text") -> None:
    """Stop at columns that a command cannot train on, and at the first cell of them that is neither text nor messages.

    Args:
        command (`str`): the training command. Of one without known columns, nothing is checked.
        rows (`Dataset` or `IterableDataset`): the rows; of streamed ones the columns alone are checked.
        source (`str`): what the rows are called.
        text (`str`, *optional*): `dataset_text_field` of SFT.

    Raises:
        StructLoRAError: it names the columns, or row and column.
    """
    forms = _COLUMNS.get(command, ()) + (((text,),) if command == "sft" else ())
    found = rows.column_names
    if (
        not found or not forms or "input_ids" in found or "prompt_input_ids" in found
    ):  # the last two: tokenized
        return
    form = next((columns for columns in forms if {*columns} <= {*found}), None)
    if form is None:
        raise StructLoRAError(
            f"the columns {', '.join(found)} in {source}",
            "the columns " + "; or ".join(", ".join(columns) for columns in forms),
            "rename the columns, or choose the command for data of this form",
        )
    from datasets import IterableDataset

    if isinstance(rows, IterableDataset):
        return
    for number, row in enumerate(islice(rows.select_columns([*form]), _LOOKED_AT), 1):
        refuse_cells({name: row[name] for name in form if name != "label"}, number, source)


def refuse_cells(cells: dict, number: int, source: str) -> None:
    """Stop at a cell that is neither text nor a list of messages.

    Args:
        cells (`dict`): by column.
        number (`int`): of their row, from 1.
        source (`str`): what the rows are called.

    Raises:
        StructLoRAError: it names row and column.
    """
    for column, cell in cells.items():
        is_text = isinstance(cell, str) and column != "messages"
        if is_text or (isinstance(cell, list) and cell and all(map(_is_message, cell))):
            continue
        shown = "nothing (null)" if cell is None else f"{cell!r:.80} ({type(cell).__name__})"
        raise StructLoRAError(
            f"{shown} in row {number}, column `{column}`, of {source}",
            "text, or a list of messages with `role` and `content`",
            "correct or remove the row; a number that is meant as text stands in quotation marks, in a .jsonl file "
            '(`"4"`), since a .csv file cannot tell the two apart',
        )


def _is_message(message) -> bool:
    if not isinstance(message, dict):
        return False
    if "from" in message:  # ShareGPT's form, which TRL rewrites
        return True
    # A message that calls tools may have no content, and one with pictures has a list of parts.
    has_content = isinstance(message.get("content"), (str, list)) or message.get("tool_calls")
    return isinstance(message.get("role"), str) and bool(has_content)


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Turn what `datasets` raises about rows into a `StructLoRAError`, as `refusing` does.

    Args:
        source (`str`): what the rows are called.
    """
    from datasets.exceptions import DatasetsError

    with refusing(
        f"reading {source}",
        "a file, a folder or a data set of the hub with rows, one example each",
        "correct the data or its name; a file begins with a path and ends in .jsonl, .json, .csv, .tsv or .parquet",
        also=(DatasetsError, RuntimeError),  # RuntimeError: a data set that is a script
    ):
        try:
            yield
        except StopIteration:  # datasets 5, of an empty file of JSON in a folder
            raise ValueError("a file without rows") from None


def count_rows(name: str, command: str) -> int | None:
    """Return how many rows a file or folder has to train on, after `check_rows`; None for a data set of the hub.

    Raises:
        StructLoRAError: as `local_path` and `check_rows`; or the rows cannot be read.
    """
    if local_path(name) is None:
        return None
    from datasets import load_dataset

    with reading(name):
        rows = load_dataset(**load_arguments(name), split="train")
    check_rows(command, rows, name)
    return len(rows)
