"""Rows of data as inputs of a model, in the formats that TRL's trainers accept."""

from __future__ import annotations

import glob
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from trl import (
    DatasetMixtureConfig,
    apply_chat_template,
    extract_prompt,
    get_dataset,
    is_conversational,
    maybe_convert_to_chatml,
)
from trl.scripts.utils import DatasetConfig

from ..errors import StructLoRAError, refusing
from .base_model import HEADS, Row, at_revision, class_count
from .cells import BUILDERS, PACKED, ending_of, refuse_cell, shown
from .inspecting import command_facts
from .load_adapter import Saved

_HELD_OUT = ("test", "validation", "eval", "dev", "valid")  # names of splits, the first that is there
# What lies beside rows that `datasets` has saved, and is none.
_NO_ROWS = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# Splits of a folder, and what names them in its files and folders, as `datasets` has it.
_SPLITS = {
    name: re.compile(rf"(?<![a-z])({words})(?![a-z])")
    for name, words in {
        "train": "train|training",
        "validation": "validation|valid|dev|val",
        "test": "test|testing|eval|evaluation",
    }.items()
}
_LENGTH = 1024  # tokens of a row that are read where the run does not say, TRL's default `max_length`
_IGNORED = -100  # as PyTorch's cross-entropy has it
_MUTE = "without a token to predict"  # why a row is left out
_FORMATS = (
    "`messages`, `prompt` and `completion`, `text`, or `chosen` and `rejected` with or without `prompt`"
)
# Columns that have a meaning; the first set that a row has is used.
_COLUMNS = (
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("messages",),
    ("prompt", "completion"),
    ("text", "label"),
    ("text",),
)
_OF_TEXT = {*(name for names in _COLUMNS for name in names), "conversations"} - {"label"}
# Inputs of a model -> dimensions of one example without the first.
_ONE_EXAMPLE = {"input_ids": 1, "pixel_values": 3}


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
    nothing to predict are left out, and counted.
    A row that is too long for the run's `max_length` (where that is unknown, 1,024 tokens or the tokenizer's
    `model_max_length`), or for the model,
    loses the beginning of its prompt; of encoder-decoder models and classifiers the end of each text.

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
    if held_out := data is None:
        found = _held_out_of(saved)
        if found is None:
            return None
        data, source = found
        _refuse_split(split, source)
    elif isinstance(data, (str, Path)):
        source = str(data)
        data = _load(source, split)
    else:
        source = "the rows given"
        _refuse_split(split, source)
    with refusing(f"reading {source}", f"rows with {_FORMATS}", "correct the data", (DatasetsError,)):
        rows = [*islice(iter(data), count)]
    if not rows:
        raise StructLoRAError(f"no rows in {source}", "some examples", "give others, or leave them out")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise StructLoRAError(
                f"row {number} of {source} to be {row!r:.40} ({type(row).__name__})",
                f"a mapping: {_FORMATS}, or inputs of the model",
                "give a list of mappings, or a `Dataset`",
            )
        if "input_ids" in row and (text := [name for name, x in row.items() if isinstance(x, str)]):
            raise StructLoRAError(
                f"text in column `{text[0]}`, beside `input_ids`, in row {number} of {source}",
                f"inputs of the model alone, or columns of text: {_FORMATS}",
                f"remove one of them (`dataset.remove_columns('{text[0]}')`)",
            )
    if not any(_OF_TEXT & row.keys() or any(isinstance(x, str) for x in row.values()) for row in rows):
        inputs = [_as_inputs(row, number, source) for number, row in enumerate(rows, 1)]
        found = [row for row in inputs if "labels" not in row or _has_some(row["labels"])]
        left_out = {_MUTE: len(inputs) - len(found)} if len(found) < len(inputs) else {}
        _refuse_none(found, source, left_out)
        return Rows(found, source, left_out, held_out)
    return _Reader(saved, base_name, revision, source).read(rows)._replace(held_out=held_out)


def _held_out_of(saved: Saved) -> tuple[Iterable[dict], str] | None:
    """The rows that the run evaluated on, as its log names them (`cli.data.held_out`)."""
    facts = command_facts(saved.folder).get("held_out")
    if not facts:
        return None
    source = "the run's held-out split"
    try:
        if "datasets" not in facts:
            return load_dataset(facts["path"], facts["name"], split=facts["split"], streaming=True), source
        parts = [DatasetConfig(**part) for part in facts["datasets"]]
        mixture = DatasetMixtureConfig(datasets=parts, test_split_size=facts["test_split_size"])
        # `train_test_split` without a seed draws from this one, which the command had set just before.
        state = np.random.get_state()
        np.random.seed(facts["seed"])
        try:
            return get_dataset(mixture)[facts["split"]], source
        finally:
            np.random.set_state(state)
    except (OSError, ValueError, TypeError, KeyError, DatasetsError) as error:
        warnings.warn(
            f"The rows that the run held out cannot be read ({' '.join(str(error).split())}): give --data.",
            stacklevel=2,
        )
        return None


def _load(name: str, split: str | None) -> Iterable[dict]:
    """A file, a folder or a data set of the hub, streamed."""
    path = Path(name).expanduser()
    with refusing(
        f"reading {name}",
        f"rows with {_FORMATS}, in a file that ends in {', '.join(BUILDERS)} (or packed, {', '.join(PACKED)}), in a folder of "
        "them, or in a data set of the hub that can be reached",
        "correct `--data`",
        (DatasetsError, RuntimeError),
    ):
        if ending_of(path) in BUILDERS and not path.is_dir():
            _refuse_split(split, name)
            return _read_files([path])
        splits = _splits_of(path) or load_dataset(str(path) if path.exists() else name, streaming=True)
        if split is None:
            split = next((known for known in _HELD_OUT if known in splits), "train")
        if split not in splits:
            raise StructLoRAError(
                f"no split '{split}' in {name} (it has {', '.join(map(repr, splits))})",
                "one of these",
                "correct `--split`",
            )
        return _read_files(splits[split]) if isinstance(splits[split], list) else splits[split]


def _splits_of(folder: Path) -> dict[str, list[Path]]:
    """Split -> files of a folder, of the most frequent ending; nothing of what is none, or has a card that names its files."""
    card = folder / "README.md"
    if card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8"):
        return {}
    names = {path: path.relative_to(folder).as_posix().lower() for path in sorted(folder.rglob("*"))}
    files = [
        path
        for path, name in names.items()
        if ending_of(path) in BUILDERS
        and path.is_file()
        and path.name not in _NO_ROWS
        and "/." not in f"/{name}"
    ]
    if not files:
        return {}
    ((ending, _),) = Counter(map(ending_of, files)).most_common(1)
    files = [path for path in files if ending_of(path) == ending]
    found = {split: [path for path in files if words.search(names[path])] for split, words in _SPLITS.items()}
    return {split: paths for split, paths in found.items() if paths} or {"train": files}


def _read_files(files: list[Path]) -> Iterable[dict]:
    """Files of one ending, streamed."""
    ending = ending_of(files[0])
    options = {"sep": "\t"} if ending == ".tsv" else {}
    options["data_files"] = [glob.escape(str(path)) for path in files]  # `datasets` takes paths for patterns
    try:
        return load_dataset(BUILDERS[ending], split="train", streaming=True, **options)
    except StopIteration:  # `datasets` 5 on an empty file of JSON
        return []


def _refuse_split(split: str | None, source: str) -> None:
    """Stop at a split of rows that have none."""
    if split is not None:
        raise StructLoRAError(
            f"split '{split}' of {source}, which has no splits",
            "a folder, or a data set of the hub",
            "remove `split`",
        )


def _has_some(labels: Tensor) -> bool:
    """Whether some are no places to ignore; scores all count."""
    return labels.is_floating_point() or bool((labels != _IGNORED).any())


def _refuse_none(found: list[Row], source: str, left_out: dict[str, int]) -> None:
    """Stop where every row was left out."""
    if not found:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise StructLoRAError(
            f"no row in {source} with a token to predict ({reasons})",
            "some rows with labels",
            "give other rows",
        )


def _as_inputs(row: dict, number: int, source: str) -> Row:
    """A row of a model's inputs, of one example: lists, numbers, and tensors of such, get a first dimension."""
    lacks_first = any(
        isinstance(row.get(name), Tensor) and row[name].ndim == dimensions
        for name, dimensions in _ONE_EXAMPLE.items()
    )
    found = {}
    for name, value in row.items():
        if isinstance(value, Tensor):
            value = value[None] if lacks_first else value
        else:
            with refusing(
                f"reading row {number}, column `{name}` of {source}",
                f"inputs of the model (tensors, numbers, lists of them), or columns of text: {_FORMATS}",
                "rename or remove the column",
                (RuntimeError,),
            ):
                value = torch.from_numpy(np.asarray(value))[None]
            value = value.float() if value.dtype == torch.float64 else value
        found[name] = value
    return found


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
            self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                saved.folder if own else base_name, **({} if own else at)
            )
        self._has_decoder = config.is_encoder_decoder
        self._classes = class_count(saved.tensors) or config.num_labels
        self._end = self._tokenizer.eos_token or ""
        limits = (
            # Models of RoBERTa's kind take fewer tokens than they have positions: the tokenizer tells.
            command_facts(saved.folder).get("max_length") or min(_LENGTH, self._tokenizer.model_max_length),
            # A decoder with positions of its own; others may have none, or none that bound them.
            getattr(config.get_text_config(), "max_position_embeddings", None) or _LENGTH,
        )
        self._limit = min(limits)
        self._left_out: dict[str, int] = {}

    def _other_task(self) -> StructLoRAError:
        return StructLoRAError(
            f"rows of text for an adapter of task {self._task}, whose labels are no tokens of them",
            "a language model that continues text, or a classifier with columns `text` and `label`",
            "give rows with `labels` from Python (`export(..., data=rows)`), or select without `--data`",
        )

    def read(self, rows: list[dict]) -> Rows:
        found = []
        for number, row in enumerate(rows, 1):
            with refusing(
                f"reading row {number} of {self._source}", f"rows with {_FORMATS}", "correct the row"
            ):
                inputs = self._inputs(row, number)
            if inputs is not None:
                found.append(inputs)
        _refuse_none(found, self._source, self._left_out)
        return Rows(found, self._source, self._left_out)

    def _inputs(self, row: dict, number: int) -> Row | None:
        # Columns that a row lacks and another has are null in it.
        present = {name: value for name, value in row.items() if value is not None}
        if "conversations" in present:
            present = maybe_convert_to_chatml(present)
        used = next((names for names in _COLUMNS if {*names} <= present.keys()), None)
        if used is None or {"image", "images"} & present.keys():
            null = [f"`{name}`" for name, value in row.items() if value is None and name in _OF_TEXT]
            empty = f" ({', '.join(null)} null)" if null else ""
            raise StructLoRAError(
                f"row {number} of {self._source} with {', '.join(present) or 'nothing'}{empty}",
                f"rows of text alone: {_FORMATS}",
                "rename the columns, or fill the cells",
            )
        example = {name: present[name] for name in used if name != "label"}
        label = present.get("label")
        label = label.item() if getattr(label, "ndim", None) == 0 else label  # of a `Dataset` with a format
        for name, value in example.items():
            refuse_cell(value, number, name, self._source)
        if self._task == "SEQ_CLS":
            return self._labelled(example, label, row, number)
        if "chosen" in example:
            if "prompt" not in example and is_conversational(example):
                example = extract_prompt(example)
            example = {
                **({"prompt": example["prompt"]} if "prompt" in example else {}),
                ("completion" if "prompt" in example else "text"): example["chosen"],
            }
        # Read as KTO's trainer does: 0 and 1 are judgements, too.
        if "completion" in example and label is not None:
            if not isinstance(label, Real):
                raise StructLoRAError(
                    f"{shown(label)} in row {number}, column `label`, of {self._source}",
                    "true or false, 1 or 0: whether the completion is desirable",
                    "write the labels so",
                )
            if not label:
                return self._without("judged undesirable")
        return self._tokens(example, present)

    def _labelled(self, example: dict, label, row: dict, number: int) -> Row:
        if "text" not in example or "label" not in row:
            raise self._other_task()
        # A column of numbers with an empty cell is of decimal ones.
        if not isinstance(label, Real) or (self._classes > 1 and label != int(label)):
            raise StructLoRAError(
                f"{shown(label)} in row {number}, column `label`, of {self._source}",
                f"the number of one of {self._classes} classes" if self._classes > 1 else "a score",
                "number the classes as in training",
            )
        ids, is_cut = self._cut(text=example["text"])
        self._count("shortened", is_cut)
        kind = torch.int64 if self._classes > 1 else torch.float32
        return {"input_ids": _row(ids), "labels": torch.tensor([label], dtype=kind, device="cpu")}

    def _cut(self, **text) -> tuple[list[int], bool]:
        """Tokens of a text, and whether it was too long; special tokens stay at its end."""
        ids = self._tokenizer(**text)["input_ids"]
        if len(ids) <= self._limit:
            return ids, False
        return self._tokenizer(**text, truncation=True, max_length=self._limit)["input_ids"], True

    def _tokens(self, example: dict, row: dict) -> Row | None:
        chat = is_conversational(example)
        if chat:
            tools = row.get("tools")
            tools = json.loads(tools) if isinstance(tools, str) else tools
            example = apply_chat_template(
                example, self._tokenizer, tools=tools, **row.get("chat_template_kwargs", {})
            )
        prompt = example.get("prompt", "")
        # A template writes the special tokens itself.
        special = {"add_special_tokens": not chat}
        if self._has_decoder:
            return self._translated(example, special)
        whole = prompt + example["completion"] if "completion" in example else example["text"]
        if not whole.strip() or not whole[len(prompt) :]:
            return self._without("empty")
        if not chat and not whole.endswith(self._end):
            whole += self._end
        ids, masked = (self._tokenizer(text, **special)["input_ids"] for text in (whole, prompt))
        # Of the prompt as it stands in the whole: its own end may be tokenized otherwise.
        shared = next(
            (i for i, (a, b) in enumerate(zip(ids, masked, strict=False)) if a != b),
            min(len(ids), len(masked)),
        )
        shared = shared if prompt else 0
        if len(ids) > self._limit:
            self._count("shortened")
            # The completion stays, with the end of its prompt; of a long one, its beginning.
            start = max(0, min(len(ids) - self._limit, shared - self._limit // 2))
            ids, shared = ids[start : start + self._limit], shared - start
        tokens = _row(ids)
        labels = tokens.clone()
        labels[:, :shared] = _IGNORED
        if not _has_some(labels[:, 1:]):  # nothing predicts the first
            return self._without(_MUTE)
        return {"input_ids": tokens, "labels": labels}

    def _translated(self, example: dict, special: dict) -> Row | None:
        """Of an encoder-decoder model: the prompt is what it reads, the completion what it writes."""
        if "completion" not in example:
            raise StructLoRAError(
                "rows without `prompt` for a model with an encoder, which reads it",
                "`prompt` and `completion`",
                "rename the columns",
            )
        completion = example["completion"]
        if not completion.strip():
            return self._without("empty")
        ids, is_cut = self._cut(text=example["prompt"], **special)
        labels, is_cut_too = self._cut(text_target=completion, **special)
        if self._tokenizer.eos_token_id is not None and labels[-1:] != [self._tokenizer.eos_token_id]:
            is_cut_too |= len(labels) == self._limit
            labels = [*labels[: self._limit - 1], self._tokenizer.eos_token_id]
        self._count("shortened", is_cut or is_cut_too)
        return {"input_ids": _row(ids), "labels": _row(labels)}

    def _without(self, reason: str) -> None:
        self._count(reason)

    def _count(self, reason: str, is_so: bool = True) -> None:
        if is_so:
            self._left_out[reason] = self._left_out.get(reason, 0) + 1


def _row(ids: list[int]) -> Tensor:
    return torch.tensor([ids], dtype=torch.int64, device="cpu")
