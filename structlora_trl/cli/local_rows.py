"""Rows of a local file, looked at before a library is imported."""

from __future__ import annotations

import csv
import glob
import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import StructLoRAError, nearest, refusing
from ..shrink import cells
from ..shrink.cells import ending_of, refuse_cell

# Of what training takes: `datasets` would read .tsv by commas.
BUILDERS = {ending: builder for ending, builder in cells.BUILDERS.items() if ending != ".tsv"}
LOOKED_AT = 10_000  # rows whose cells are looked at, a second's work; of later ones, TRL says what is wrong
_LONGEST_CELL = 2**31 - 1  # characters of a .csv file's, as pandas has it
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


def is_local(name: str) -> bool:
    """Whether a name is one of a local file or folder of rows, which has to be there then.

    Raises:
        StructLoRAError: it is not there.
    """
    is_file, path = ending_of(name) in cells.BUILDERS, os.path.expanduser(name)
    if not is_file and not name.startswith((".", "/", "~")):
        return False
    if not os.path.exists(path):
        what = "file" if is_file else "folder"
        raise StructLoRAError(
            f"no {what} {path}",
            "rows, one example each",
            f"correct the path{nearest(path)}, or make the file",
        )
    return True


def local_data(name: str, files: Any = None) -> tuple[str, Any]:
    """What `load_dataset` calls a local file that training takes: its builder and its path. Other names stay.

    Raises:
        StructLoRAError: no such file or folder, an empty file, or one of a kind that training does not take.
    """
    if not is_local(name):
        return name, files
    path, builder = os.path.expanduser(name), BUILDERS.get(Path(name).suffix.lower())
    if not os.path.isfile(path):
        return path, files
    if builder is None:
        raise StructLoRAError(
            f"{path} as rows to train on",
            f"a file that ends in {', '.join(BUILDERS)}",
            "unpack it, or write the rows as one of these",
        )
    with open(path, "rb") as file:
        if not file.read(4096).strip():
            raise StructLoRAError(
                f"{path} empty", "rows, one example each", "write the rows, or correct the path"
            )
    return builder, glob.escape(path)  # `datasets` takes paths for patterns


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


def count_rows(data: str, command: str = "sft") -> int | None:
    """How many rows a file has, after a look at the first ones; None for what is no single file.

    Raises:
        StructLoRAError: as `look_at`; or fewer than two rows.
    """
    count = look_at(data, command, whole=True)
    if count is not None and count < 2:
        raise StructLoRAError(
            f"{count} rows in {data}", "rows to train on, and others to hold out", "give more rows"
        )
    return count


def look_at(data: str, command: str, text: str = "text", whole: bool = False) -> int | None:
    """Look at the first rows of a file that a command is to train on.

    Args:
        data (`str`): the file; what is no single file is passed over.
        command (`str`): the command, whose columns the rows need.
        text (`str`, *optional*): of SFT, `dataset_text_field`.
        whole (`bool`, *optional*, defaults to False): read to the end, and files too that have no first lines:
            one list of rows, and .parquet, which is read with all its columns, pictures too.

    Returns:
        `int`, *optional*: the rows, if `whole`; None for what is no single file.

    Raises:
        StructLoRAError: the file is not there or cannot be read, or has columns or cells that the command
            does not take.
    """
    builder, _ = local_data(data)
    path = Path(data).expanduser()
    if builder not in BUILDERS.values() or not path.is_file() or not (whole or _has_lines(path)):
        return None
    with refusing(f"reading {path}", "rows, one example each", "correct the file", also=(csv.Error,)):
        rows = _read(path)
        first = [*islice(rows, LOOKED_AT)]
        count = _count(path, len(first), rows) if whole else None
    for number, row in enumerate(first, 1):
        if not isinstance(row, dict):
            raise StructLoRAError(
                f"row {number} of {path} to be {row!r:.40} ({type(row).__name__})",
                "cells by column",
                'write each row as `{"text": ...}`, say',
            )
    if form := form_of(command, [*dict.fromkeys(name for row in first for name in row)], text):
        refuse_cells(form, first, str(path))
    return count


def _has_lines(path: Path) -> bool:
    return path.suffix.lower() != ".parquet" and not _is_list(path)


def _is_list(path: Path) -> bool:
    """Whether a file of JSON is one list, and not a row on each line."""
    if BUILDERS[path.suffix.lower()] != "json":
        return False
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.read(1) == "["


def _count(path: Path, seen: int, rest: Iterator) -> int:
    if path.suffix.lower() == ".parquet":
        from pyarrow.parquet import read_metadata

        return read_metadata(path).num_rows
    return seen + sum(1 for _ in rest)


def _read(path: Path) -> Iterator:
    """Rows; of .jsonl files those after the first `LOOKED_AT` as they stand there."""
    if path.suffix.lower() == ".parquet":
        from pyarrow.parquet import ParquetFile  # which loads in a moment, but not without need

        for batch in ParquetFile(path).iter_batches(LOOKED_AT):
            yield from batch.to_pylist()
        return
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".csv":  # where an empty cell is null
            csv.field_size_limit(_LONGEST_CELL)
            for row in csv.DictReader(file):
                yield {name: cell or None for name, cell in row.items() if name}
        elif _is_list(path):
            yield from json.load(file)
        else:
            lines = (line for line in file if line.strip())
            for number, line in enumerate(lines, 1):
                if number > LOOKED_AT:
                    yield line
                    continue
                with refusing(f"reading row {number} of {path}", "a line of JSON", "correct the line"):
                    yield json.loads(line)
