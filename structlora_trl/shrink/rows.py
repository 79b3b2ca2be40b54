"""Rows of data as inputs of a model, in the formats that TRL's trainers accept."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from trl import (
    DatasetMixtureConfig,
    apply_chat_template,
    extract_prompt,
    get_dataset,
    is_conversational,
    maybe_convert_to_chatml,
)

from ..errors import StructLoRAError, refusing
from ..local_data import load_arguments, reading, refuse_cells
from .base_model import HEADS, Row, at_revision, class_count
from .inspecting import command_facts
from .load_adapter import Saved

_HELD_OUT = ("test", "validation", "eval", "dev", "valid")  # names of splits, the first that is there
_LENGTH = 1024  # tokens of a row that are read where the run does not say, TRL's default `max_length`
_IGNORED = -100  # as PyTorch's cross-entropy has it
_MUTE, _UNDESIRABLE = "without a token to predict", "judged undesirable"  # why a row is left out
_FORMATS = (
    "`messages`, `prompt` and `completion`, `text`, or `chosen` and `rejected` with or without `prompt`"
)
# Columns that have a meaning; the first set that a row has is used.
_COLUMNS = (
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("messages",),
    ("prompt", "completion"),
    ("text",),
)
# Inputs of a model -> dimensions of one example without the first.
_ONE_EXAMPLE = {"input_ids": 1, "pixel_values": 3}
_OF_TEXT = {*(name for names in _COLUMNS for name in names), "conversations"}


class Rows(NamedTuple):
    """Rows that were read: inputs of the model, where they are from, what was left out, by reason, and whether the run
    held them out of its training.
    """

    rows: list[Row]
    source: str
    left_out: dict[str, int]
    held_out: bool = False

    def told(self) -> str:
        """In words."""
        more = "".join(f", {count} {reason}" for reason, count in self.left_out.items())
        return f"{len(self.rows)} rows of {self.source}{more}"


def read_rows(
    data: str | Path | Iterable[dict] | None,
    saved: Saved,
    base_name: str | None,
    revision: str | None,
    count: int,
    split: str | None = None,
) -> Rows | None:
    """Read the first rows, with labels: the completion's tokens where there is a prompt, else all.

    Of pairs, the chosen completion is read; of rows that are judged one by one (`label`), those judged good. Rows with
    nothing to predict are left out, and counted. A row ends at the run's `max_length` (where that is unknown, at 1,024
    tokens or the tokenizer's `model_max_length`), or where the model's positions do, as in training.

    Args:
        data (`str`, `Path` or rows, *optional*): a file (.json, .jsonl, .csv, .tsv, .parquet, also packed as
            .gz), a folder of them, or a data set of the hub, with columns `messages`, `prompt` and `completion`
            (texts or messages), `conversations` (`from` and `value`), `text`, or `chosen` and `rejected`, for
            classifiers `text` and `label`; rows of these columns as a list or a `Dataset`; or inputs of the
            model, of one example each. Where omitted, the rows that the run held out of its training.
        saved (`Saved`): the adapter, whose own tokenizer is used where it lies beside it, as trainers save
            it.
        base_name, revision (`str`, *optional*): of the base model, whose tokenizer is used otherwise.
        count (`int`): most rows to read.
        split (`str`, *optional*): of a folder or of a data set of the hub; where omitted one that is called
            "test", "validation" or the like, else "train".

    Returns:
        `Rows`; None where `data` is omitted and the run held nothing out, or its data are gone (which is told
        by a warning).

    Raises:
        StructLoRAError: nothing there to read, no tokenizer, rows of another format, or a model with another
            task.
    """
    is_named = isinstance(data, (str, Path))
    if split is not None and not is_named:
        raise StructLoRAError(
            f"split '{split}' of rows that have no splits",
            "a folder, or a data set of the hub",
            "remove `split`",
        )
    is_held_out, source = data is None, str(data) if is_named else "the rows given"
    if is_held_out:
        data, source = _held_out_of(saved), "the run's held-out split"
        if data is None:
            return None
    with reading(source):
        rows = [dict(row) for row in islice(_load(source, split) if is_named else data, count)]
    if not rows:
        raise StructLoRAError(f"no rows in {source}", "some examples", "give others, or leave them out")
    cells = [(name, cell) for row in rows for name, cell in row.items()]
    is_text = any(name in _OF_TEXT or isinstance(cell, str) for name, cell in cells)
    is_tokens = any(name == "input_ids" for name, _ in cells)
    read = _Reader(saved, base_name, revision, source).read if is_text and not is_tokens else _as_inputs
    found, left_out = [], Counter()
    for number, row in enumerate(rows, 1):
        with refusing(
            f"reading row {number} of {source}",
            f"columns of text ({_FORMATS}), or inputs of the model alone: tensors, numbers, lists of them",
            "correct the row, or remove what is of neither kind",
            (RuntimeError,),
        ):
            inputs = read(row, number)
        if isinstance(inputs, str):
            left_out[inputs] += 1
        else:
            found.append(inputs)
    if not found:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise StructLoRAError(
            f"no row in {source} with a token to predict ({reasons})",
            "some rows with labels",
            "give other rows",
        )
    return Rows(found, source, dict(left_out), is_held_out)


def _held_out_of(saved: Saved) -> Iterable[dict] | None:
    """The rows that the run evaluated on, as its log names them (`cli.data.held_out`)."""
    facts = dict(command_facts(saved.folder).get("held_out") or {})
    if not facts:
        return None
    split, seed = facts.pop("split"), facts.pop("seed", None)
    # `train_test_split` without a seed draws from this one, which the command had set just before.
    state = np.random.get_state()
    try:
        if "datasets" not in facts:
            return load_dataset(**facts, split=split, streaming=True)
        np.random.seed(seed)
        return get_dataset(DatasetMixtureConfig(**facts))[split]
    except (OSError, ValueError, TypeError, KeyError, DatasetsError) as error:
        told = " ".join(str(error).split())
        warnings.warn(f"The rows that the run held out cannot be read ({told}): give --data.", stacklevel=2)
        return None
    finally:
        np.random.set_state(state)


def _load(name: str, split: str | None) -> Iterable[dict]:
    """A file, a folder or a data set of the hub, streamed."""
    splits = load_dataset(**load_arguments(name), streaming=True)
    if split is None:
        split = next((known for known in _HELD_OUT if known in splits), "train")
    if split not in splits:
        raise StructLoRAError(
            f"no split '{split}' in {name} (it has {', '.join(map(repr, splits))})",
            "one of these",
            "correct `--split`",
        )
    return splits[split]


def _as_inputs(row: dict, number: int) -> Row | str:
    """Return a row of a model's inputs, with a first dimension where they lack it; or why it is left out."""
    lacks_first = any(
        isinstance(row.get(name), Tensor) and row[name].ndim == dimensions
        for name, dimensions in _ONE_EXAMPLE.items()
    )
    found = {}
    for name, value in row.items():
        if not isinstance(value, Tensor):
            value = torch.from_numpy(np.asarray(value))[None]
        elif lacks_first:
            value = value[None]
        found[name] = value.float() if value.dtype == torch.float64 else value
    # Scores all count, tokens but those to ignore.
    labels = found.get("labels")
    is_mute = labels is not None and not labels.is_floating_point() and bool((labels == _IGNORED).all())
    return _MUTE if is_mute else found


class _Reader:
    """Turns rows of text into inputs of one model."""

    def __init__(self, saved: Saved, base_name: str | None, revision: str | None, source: str):
        self._source, self._task = source, saved.lora.task_type
        if self._task in HEADS and self._task not in ("SEQ_CLS", "SEQ_2_SEQ_LM"):
            raise self._other_task()
        at = at_revision(revision)
        with refusing(
            f"loading the configuration and the tokenizer of {base_name}",
            "the base model's, and its tokenizer where none lies beside the adapter",
            "give the base model's folder or its name on the hub: `--base MODEL`; remove a tokenizer that cannot be read",
            (Exception,),  # of tokenizers, bare ones
        ):
            config = AutoConfig.from_pretrained(base_name, **at)
            own = (saved.folder / "tokenizer_config.json").is_file()
            self._tokenizer = AutoTokenizer.from_pretrained(
                saved.folder if own else base_name, **({} if own else at)
            )
        self._is_encoder_decoder = config.is_encoder_decoder
        self._classes = class_count(saved.tensors) or config.num_labels
        self._limit = min(
            # Models of RoBERTa's kind take fewer tokens than they have positions: the tokenizer tells.
            command_facts(saved.folder).get("max_length") or min(_LENGTH, self._tokenizer.model_max_length),
            # A decoder with positions of its own; others may have none, or none that bound them.
            getattr(config.get_text_config(), "max_position_embeddings", None) or _LENGTH,
        )

    def _other_task(self) -> StructLoRAError:
        return StructLoRAError(
            f"rows of text for an adapter of task {self._task}, whose labels are no tokens of them",
            "a language model that continues text, or a classifier with columns `text` and `label`",
            "give rows with `labels` from Python (`export(..., data=rows)`), or select without `--data`",
        )

    def read(self, row: dict, number: int) -> Row | str:
        """Return the inputs of a row, or why it is left out."""
        # Columns that a row lacks and another has are null in it.
        present = {name: value for name, value in row.items() if value is not None}
        if "conversations" in present:
            present = maybe_convert_to_chatml(present)
        used = next((names for names in _COLUMNS if {*names} <= present.keys()), None)
        if used is None or {"image", "images"} & present.keys():
            raise StructLoRAError(
                f"row {number} of {self._source} with {', '.join(present) or 'nothing'}",
                f"rows of text alone, without empty cells: {_FORMATS}",
                "rename the columns, or fill the cells",
            )
        example = {name: present[name] for name in used}
        refuse_cells(example, number, self._source)
        is_classified = self._task == "SEQ_CLS"
        if is_classified and not ("text" in example and "label" in row):
            raise self._other_task()
        if not is_classified and not ("completion" in example and "label" in present):
            return self._tokens(example, present)
        label = np.asarray(row["label"]).item()  # of a `Dataset` with a format, too
        is_class = is_classified and self._classes > 1
        if not isinstance(label, Real) or (is_class and label != int(label)):
            raise StructLoRAError(
                f"{label!r:.40} in row {number}, column `label`, of {self._source}",
                "the number of a class or a score, as in training; of completions true or false, 1 or 0",
                "correct the label",
            )
        if is_classified:
            labels = torch.tensor([label], dtype=torch.int64 if is_class else torch.float32, device="cpu")
            return {"input_ids": self._ids(example["text"]), "labels": labels}
        # Read as KTO's trainer does: 0 and 1 are judgements, too.
        return self._tokens(example, present) if label else _UNDESIRABLE

    def _tokens(self, example: dict, row: dict) -> Row | str:
        if "chosen" in example:
            if "prompt" not in example and is_conversational(example):
                example = extract_prompt(example)
            name = "completion" if "prompt" in example else "text"
            example = {**example, name: example["chosen"]}
            del example["chosen"], example["rejected"]
        # A template writes the special tokens itself, and an end of its own.
        has_template = is_conversational(example)
        if has_template:
            tools = row.get("tools")
            tools = json.loads(tools) if isinstance(tools, str) else tools
            more = row.get("chat_template_kwargs", {})
            example = apply_chat_template(example, self._tokenizer, tools=tools, **more)
        how = {"add_special_tokens": not has_template}
        if self._is_encoder_decoder:  # which reads the prompt, and writes the completion
            if "completion" not in example:
                raise StructLoRAError(
                    "rows without `prompt` for a model with an encoder, which reads it",
                    "`prompt` and `completion`",
                    "rename the columns",
                )
            labels = self._ids(text_target=example["completion"], **how)
            return {"input_ids": self._ids(example["prompt"], **how), "labels": labels}
        prompt, end = example.get("prompt", ""), self._tokenizer.eos_token or ""
        whole = prompt + example["completion"] if "completion" in example else example["text"]
        whole += "" if has_template or whole.endswith(end) else end
        tokens = self._ids(whole, **how)
        labels = tokens.clone()
        if prompt:
            alone = self._ids(prompt, **how)
            length = min(tokens.shape[1], alone.shape[1])
            # Of the prompt as it stands in the whole: its own end may be tokenized otherwise.
            is_same = (tokens[0, :length] == alone[0, :length]).int().cumprod(0)
            labels[:, : int(is_same.sum())] = _IGNORED
        is_mute = bool((labels[:, 1:] == _IGNORED).all())  # nothing predicts the first
        return _MUTE if is_mute else {"input_ids": tokens, "labels": labels}

    def _ids(self, *text: str, **how) -> Tensor:
        """Return the tokens of a text, (1, tokens), as many as the model may read."""
        cut = self._tokenizer(*text, truncation=True, max_length=self._limit, **how)
        return torch.tensor([cut["input_ids"]], dtype=torch.int64, device="cpu")
