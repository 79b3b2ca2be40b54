"""Files of rows by their endings, and cells that no trainer takes. Nothing heavy is imported for it."""

from __future__ import annotations

from pathlib import Path

from ..errors import StructLoRAError

# Ending of a file of rows -> what `datasets` calls its reader.
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
PACKED = (".gz", ".bz2", ".xz", ".zst")


def ending_of(path: str | Path) -> str:
    """What says of which kind a file is, in lower case: ".jsonl" of "ROWS.JSONL.gz"."""
    path = Path(path)
    return (Path(path.stem) if path.suffix.lower() in PACKED else path).suffix.lower()


def refuse_cell(cell, number: int, column: str, source: str) -> None:
    """Stop at a cell that is neither text nor a list of messages.

    Args:
        cell: what stands there.
        number (`int`): of its row, from 1.
        column (`str`): its column.
        source (`str`): what the rows are called.

    Raises:
        StructLoRAError: it names row and column.
    """
    if found := _what_is_wrong(cell, column):
        raise StructLoRAError(
            f"{found} in row {number}, column `{column}`, of {source}",
            "text, or a list of messages with `role` and `content`",
            "correct or remove the row; a number that is meant as text stands in quotation marks, in a .jsonl file "
            '(`"4"`), since a .csv file cannot tell the two apart',
        )


def _what_is_wrong(cell, column: str) -> str | None:
    """What a cell is, in words, where it is neither text nor messages."""
    if isinstance(cell, str):
        return f"text ({cell!r:.40})" if column == "messages" else None
    if not isinstance(cell, (list, tuple)) or not cell:
        return shown(cell)
    if not all(isinstance(message, dict) for message in cell):
        return "a list of something other than messages"
    for number, message in enumerate(cell, 1):
        if "from" in message:  # ShareGPT's form, which TRL rewrites
            continue
        # A message that calls tools may have no content, and one with pictures has a list of parts.
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            return f"{shown(role)} as the `role` of message {number}"
        if not isinstance(content, (str, list)) and (content is not None or not message.get("tool_calls")):
            return f"{shown(content)} as the `content` of message {number}"
    return None


def shown(value) -> str:
    """A cell of a wrong kind, in words."""
    return "nothing (null)" if value is None else f"{value!r:.40} ({type(value).__name__})"
