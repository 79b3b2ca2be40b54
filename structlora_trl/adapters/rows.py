"""Rows of a data file as inputs of a language model, in the formats that TRL's SFTTrainer accepts."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import apply_chat_template, is_conversational, maybe_convert_to_chatml

from ..errors import StructLoRAError, refusing
from .load_adapter import Saved
from .measuring import HEADS, Row

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_LENGTH = 1024  # tokens of a row that are read, TRL's default `max_length`
_IGNORED = -100  # as PyTorch's cross-entropy has it
_FORMATS = "`messages`, `prompt` and `completion`, or `text`"


def read_rows(
    file: str | Path, saved: Saved, base_name: str | None, revision: str | None, count: int
) -> list[Row]:
    """Read the first rows of a file, with labels: the completion's tokens where there is a prompt, else all.

    Args:
        file (`str` or `Path`): .json, .jsonl, .csv or .parquet; columns `messages`, `prompt` and `completion`
            (texts or messages), `conversations` (`from` and `value`), or `text`.
        saved (`Saved`): the adapter, whose own tokenizer is used where it lies beside it, as trainers save
            it.
        base_name, revision (`str`, *optional*): of the base model, whose tokenizer is used otherwise.
        count (`int`): most rows to read.

    Raises:
        StructLoRAError: no such file, no tokenizer, rows of another format, or a model with another task.
    """
    path = Path(file)
    if saved.lora.task_type in HEADS:
        raise StructLoRAError(
            f"rows of text for an adapter of task {saved.lora.task_type}, whose labels are no tokens of them",
            "a language model that continues text",
            "give rows with `labels` from Python (`export(..., data=rows)`), or select without `--data`",
        )
    if path.suffix not in _BUILDERS or not path.is_file():
        raise StructLoRAError(
            f"no data file {file}",
            f"a file that ends in {', '.join(_BUILDERS)}",
            "correct the path given as `--data`",
        )
    with refusing(f"reading {file}", f"rows with {_FORMATS}", "correct the file"):
        try:
            data = load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train", streaming=True)
        except StopIteration:  # `datasets` 5 on an empty file of JSON
            data = []
        rows = [*islice(data, count)]
    with refusing(
        "loading a tokenizer", "one beside the adapter, or the base model's", "give `--base MODEL`"
    ):
        if (saved.folder / "tokenizer_config.json").is_file():
            base_name, revision = saved.folder, None
        tokenizer = AutoTokenizer.from_pretrained(base_name, **({"revision": revision} if revision else {}))
    with refusing(f"tokenizing the rows of {file}", f"rows with {_FORMATS}", "correct the file"):
        found = [_tokenized(row, tokenizer, file) for row in rows]
    found = [row for row in found if (row["labels"][:, 1:] != _IGNORED).any()]
    if not found:
        raise StructLoRAError(
            f"no row in {file} with a token to predict", "some rows of text", "give another file"
        )
    return found


def _tokenized(row: dict, tokenizer: PreTrainedTokenizerBase, file: str | Path) -> Row:
    row = {name: value for name, value in row.items() if value is not None}
    if "conversations" in row:
        row = maybe_convert_to_chatml(row)
    used = next(
        (names for names in (["messages"], ["prompt", "completion"], ["text"]) if {*names} <= row.keys()),
        None,
    )
    if used is None or {"image", "images"} & row.keys():
        raise StructLoRAError(
            f"a row with {', '.join(row) or 'nothing'} in {file}",
            f"rows of text alone: {_FORMATS}",
            "rename the columns",
        )
    example = {name: row[name] for name in used}
    chat = is_conversational(example)
    if chat:
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options = row.get("chat_template_kwargs", {})
        example = apply_chat_template(example, tokenizer, tools=tools, **options)
    prompt = example.get("prompt", "")
    whole = prompt + example["completion"] if "completion" in example else example["text"]
    end = tokenizer.eos_token or ""
    if not chat and not whole.endswith(end):
        whole += end
    # A template writes the special tokens itself.
    ids, masked = (tokenizer(text, add_special_tokens=not chat)["input_ids"] for text in (whole, prompt))
    tokens = torch.tensor([ids[:_LENGTH]], dtype=torch.int64, device="cpu")
    labels = tokens.clone()
    if prompt:
        # Of the prompt as it stands in the whole: its own end may be tokenized otherwise.
        shared = next(
            (i for i, (a, b) in enumerate(zip(ids, masked, strict=False)) if a != b),
            min(len(ids), len(masked)),
        )
        labels[:, :shared] = _IGNORED
    return {"input_ids": tokens, "labels": labels}
