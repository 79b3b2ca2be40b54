"""Rows of data: what is read of files, folders and rows from Python, and what is refused, by row and column."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSeq2SeqLM, BatchEncoding
from trl import SFTTrainer

from structlora_trl.cli import main
from structlora_trl.errors import StructLoRAError
from structlora_trl.shrink.export import export
from structlora_trl.shrink.inspecting import log_history
from structlora_trl.shrink.load_adapter import read_saved
from structlora_trl.shrink.rows import read_rows
from tests.support.adapters import as_it_is, peft_run
from tests.support.cli_runs import SFT, command_line
from tests.support.data import save_base, texts, write_rows
from tests.support.setups import gpt2, roberta, t5
from tests.support.tiny import FAMILIES, tokenizer

TEXTS = texts()[:6]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter of PEFT, with a base model and a tokenizer beside it."""
    return adapter_of("llama", tmp_path_factory.mktemp("rows"), target_modules=["q_proj", "v_proj"])


def adapter_of(build, folder: Path, family: str = "llama", **lora):
    model = as_it_is(build)(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    return read_saved(peft_run(model, folder / "out", FAMILIES[family].batch, **lora))


def read(saved, data, count: int = 64, **options):
    return read_rows(data, saved, saved.lora.base_model_name_or_path, None, count, **options)


def write_text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def lines(rows) -> str:
    return "\n".join(map(json.dumps, rows))


def folder_of_splits(folder: Path) -> Path:
    folder.mkdir()
    write_rows(folder / "train.jsonl", [{"text": "w1 w1"}] * 3)
    write_rows(folder / "test.jsonl", TEXTS)
    return folder


def packed(path: Path) -> Path:
    path.write_bytes(gzip.compress(lines(TEXTS).encode()))
    return path


# Where six rows lie -> how they get there
PLACES = {
    "a list of JSON": lambda d: write_text(d / "rows.json", json.dumps(TEXTS)),
    "a name with brackets": lambda d: write_text(d / "rows[1].jsonl", lines(TEXTS)),
    "packed": lambda d: packed(d / "rows.jsonl.gz"),
    "columns by tabs": lambda d: write_text(
        d / "rows.tsv", "\n".join(["text", *(row["text"] for row in TEXTS)])
    ),
    "a folder with splits": lambda d: folder_of_splits(d / "rows"),
    "a folder of folders": lambda d: folder_of_splits(d / "rows") and d,
    "a list": lambda d: TEXTS,
    "a data set": lambda d: Dataset.from_list(TEXTS),
    "a generator": lambda d: iter(TEXTS),
}


@pytest.mark.parametrize("place", PLACES)
def test_rows_are_read_wherever_they_are(place, saved, tmp_path):
    data = PLACES[place](tmp_path)
    rows = read(saved, str(data) if isinstance(data, Path) else data)
    found = [tokenizer().decode(row["input_ids"][0]).removesuffix("<eos>").strip() for row in rows.rows]
    assert found == [row["text"].strip() for row in TEXTS]


def test_a_split_is_the_one_that_is_named(saved, tmp_path):
    folder = str(folder_of_splits(tmp_path / "rows"))
    assert len(read(saved, folder, split="train").rows) == 3
    with pytest.raises(
        StructLoRAError, match="no split 'dev'.*'train', 'test'|no split 'dev'.*'test', 'train'"
    ):
        read(saved, folder, split="dev")


def test_a_split_of_what_has_none_is_refused(saved, tmp_path):
    with pytest.raises(StructLoRAError, match="split 'test' of rows that have no splits"):
        read(saved, TEXTS, split="test")
    with pytest.raises(StructLoRAError, match="no split 'test' in .*'train'"):
        read(saved, str(write_text(tmp_path / "rows.jsonl", lines(TEXTS))), split="test")


def kto(label) -> dict:
    return {"prompt": "w1 w2 ", "completion": "w3", "label": label}


# Rows -> what is predicted, and what is left out
MEANING = {
    "the chosen of a pair": ([{"prompt": "w1 w2 ", "chosen": "w3", "rejected": "w4"}], ["w3 <eos>"], {}),
    "a pair without a prompt": ([{"chosen": "w3 w5", "rejected": "w4"}], ["w3 w5 <eos>"], {}),
    **{
        f"judged by {type(good).__name__}": (
            [kto(good), kto(bad)],
            ["w3 <eos>"],
            {"judged undesirable": 1},
        )
        for good, bad in (
            (True, False),
            (1, 0),
            (np.True_, np.False_),
            (torch.tensor(True), torch.tensor(False)),
        )
    },
    "inputs as a tokenizer gives them": (
        [BatchEncoding({"input_ids": [1, 5], "labels": [-100, 5]})],
        [tokenizer().decode([5])],
        {},
    ),
    "inputs with nothing to predict among others": (
        [{"input_ids": [1, 5], "labels": labels} for labels in ([-100, 5], [-100, -100])],
        [tokenizer().decode([5])],
        {"without a token to predict": 1},
    ),
    "an empty one": ([{"text": "w1 w2"}, {"text": " "}], ["w1 w2 <eos>"], {"without a token to predict": 1}),
    "a long prompt": (
        [{"prompt": "w1 " * 1500, "completion": "w3 w4"}, {"prompt": "w1 w2 ", "completion": "w3"}],
        ["w3 <eos>"],
        {"without a token to predict": 1},
    ),
}


@pytest.mark.parametrize("name", MEANING)
def test_rows_of_every_trainer_are_used_rightly(name, saved):
    rows, expected, left_out = MEANING[name]
    found = read(saved, rows)
    predicted = [tokenizer().decode(row["labels"][row["labels"] >= 0]) for row in found.rows]
    assert predicted == expected and found.left_out == left_out
    assert all(row["input_ids"].shape[1] <= 1024 for row in found.rows)
    for reason, count in left_out.items():
        assert f"{count} {reason}" in found.told()


# Rows that are no examples -> words of the message
WRONG = {
    "a number": ([{"text": "w1"}, {"text": 5}], "5 .int. in row 2, column `text`, of the rows given"),
    "nothing": ([{"prompt": "w1", "completion": None}], "row 1 of the rows given with prompt"),
    "a message without content": (
        [{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": None}]}],
        "in row 1, column `messages`",
    ),
    "a list of words": ([{"text": ["w1"]}], r"\['w1'\] \(list\) in row 1, column `text`"),
    "messages that are text": ([{"messages": "[{'role': 'user'}]"}], r"\(str\) in row 1, column `messages`"),
    "no messages": (
        [{"prompt": [], "chosen": [], "rejected": []}],
        r"\[\] \(list\) in row 1, column `prompt`",
    ),
    "a judgement in words": ([kto("False")], "'False' in row 1, column `label`, of the rows given"),
    "no mapping": (["w1 w2"], "reading the rows given failed"),
    "prompts alone": ([{"prompt": "w1", "solution": "w2"}], "row 1.*with prompt, solution"),
    "another input": ([{"input_ids": [1, 2], "labels": object()}], "reading row 1 .*object"),
    "inputs with nothing to predict": (
        [{"input_ids": [1, 2], "labels": [-100, -100]}],
        r"no row in the rows given with a token to predict \(1 without",
    ),
    "text beside inputs": (
        [{"input_ids": [1, 2], "labels": [1, 2], "source": "web"}],
        "reading row 1 .*str_",
    ),
    "uneven lists": ([{"input_ids": [[1, 2], [3]], "labels": [1, 2]}], "reading row 1 "),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_cell_is_named_by_row_and_column(name, saved):
    rows, words = WRONG[name]
    with pytest.raises(StructLoRAError, match=words):
        read(saved, rows)


def test_lists_of_numbers_are_inputs_of_one_example(saved, tmp_path):
    ids = FAMILIES["llama"].batch(3)["input_ids"]
    given = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids]
    tensors = [{"input_ids": row, "labels": row} for row in ids]
    for data in (given, Dataset.from_list(given), Dataset.from_list(given).with_format("torch"), tensors):
        assert torch.equal(torch.cat([row["input_ids"] for row in read(saved, data).rows]), ids)
    assert export(saved, tmp_path / "small", rank=2, data=given).losses.before > 0
    unread = [{"input_ids": [1, 2], "labels": [5, -100]}]  # the first token is predicted from nothing
    with pytest.raises(StructLoRAError, match="a loss of nan"):
        export(saved, tmp_path / "refused", rank=2, data=unread)


def test_rows_are_no_longer_than_the_model_takes(tmp_path):
    saved = adapter_of(gpt2, tmp_path, target_modules=["c_attn"], fan_in_fan_out=True)
    rows = read(saved, [{"text": "w1 " * 100}])
    longest = positions(saved)
    assert rows.rows[0]["input_ids"].shape[1] == longest
    assert export(saved, tmp_path / "small", rank=2, data=[{"text": "w1 " * 100}]).losses.after > 0


def test_rows_are_no_longer_than_the_tokenizer_says(tmp_path):
    """Of RoBERTa's positions, the first ones are of the padding."""
    saved = adapter_of(roberta, tmp_path, "bert", target_modules=["query"], task_type="SEQ_CLS")
    of_base = tokenizer()
    of_base.model_max_length = 62
    of_base.save_pretrained(saved.lora.base_model_name_or_path)
    rows = [{"text": "w1 " * 100, "label": 0}, {"text": "w1 w2", "label": 1}]
    found = export(saved, tmp_path / "small", rank=1, data=rows)
    assert found.rows.left_out == {} and found.losses.after > 0


@pytest.mark.parametrize("task", ["SEQ_CLS", "SEQ_2_SEQ_LM"])
def test_what_an_encoder_reads_is_cut_before_its_special_tokens(task, tmp_path):
    if task == "SEQ_CLS":
        saved = adapter_of("bert", tmp_path, "bert", target_modules=["query"], task_type=task)
        rows = [{"text": "w1 " * length, "label": 0} for length in (2000, 3)]
    else:
        saved = adapter_of(t5, tmp_path, target_modules=["q"], task_type=task)
        sizes = ((2000, 2000), (3, 1024), (3, 1023))  # the last one and its end are as long as may be
        rows = [{"prompt": "w1 " * a, "completion": "w2 " * b} for a, b in sizes]
    ending = tokenizer()
    ends = [("<eos>", ending.eos_token_id)]
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=ends)
    ending.save_pretrained(saved.lora.base_model_name_or_path)
    found = read(saved, rows)
    for row in found.rows:
        for ids in [row["input_ids"]] + ([row["labels"]] if task == "SEQ_2_SEQ_LM" else []):
            assert ids[0, -1] == ending.eos_token_id and (ids == ending.eos_token_id).sum() == 1
            assert ids.shape[1] <= 1024


def positions(saved) -> int:
    return json.loads((Path(saved.lora.base_model_name_or_path) / "config.json").read_text())["n_positions"]


@pytest.mark.parametrize("task", ["SEQ_2_SEQ_LM", None])
def test_an_encoder_reads_the_prompt_whatever_the_task_is_called(task, tmp_path):
    saved = adapter_of(t5, tmp_path, target_modules=["q", "v"], task_type=task)
    (row,) = read(saved, [{"prompt": "w1 w2 w3", "completion": "w4 w5"}]).rows
    decode = tokenizer().decode
    assert decode(row["input_ids"][0]).startswith("w1 w2 w3") and "w4" not in decode(row["input_ids"][0])
    assert decode(row["labels"][0]) == "w4 w5"
    model = AutoModelForSeq2SeqLM.from_pretrained(saved.lora.base_model_name_or_path)
    assert export(
        saved, tmp_path / "small", rank=1, data=[{"prompt": "w1 w2", "completion": "w3"}]
    ).losses.base == (
        pytest.approx(
            float(model.eval()(**read(saved, [{"prompt": "w1 w2", "completion": "w3"}]).rows[0]).loss),
            abs=1e-5,
        )
    )
    with pytest.raises(StructLoRAError, match="rows without `prompt` for a model with an encoder"):
        read(saved, TEXTS)


def test_a_classifier_takes_texts_with_labels(tmp_path):
    saved = adapter_of("bert", tmp_path, "bert", target_modules=["query", "value"], task_type="SEQ_CLS")
    rows = [{"text": "w1 w2 w3", "label": i % 2} for i in range(4)]
    assert [row["labels"].tolist() for row in read(saved, rows).rows] == [[0], [1], [0], [1]]
    tensors = Dataset.from_list(rows).with_format("torch")
    assert [row["labels"].tolist() for row in read(saved, tensors).rows] == [[0], [1], [0], [1]]
    assert export(saved, tmp_path / "small", keep=0.5, data=rows).losses.after > 0
    # An empty cell anywhere makes a column of decimal numbers.
    assert [row["labels"].dtype for row in read(saved, [{**rows[0], "label": 1.0}]).rows] == [torch.int64]
    for label, words in ((None, "None"), ("good", "'good'"), (0.5, "0.5")):
        with pytest.raises(StructLoRAError, match=f"{words} in row 5, column `label`, of the rows given"):
            read(saved, [*rows, {"text": "w1", "label": label}])
    with pytest.raises(StructLoRAError, match="columns `text` and `label`"):
        read(saved, TEXTS)


def test_without_data_the_rows_are_those_that_the_run_held_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "base")
    write_rows(tmp_path / "data.jsonl", [{"text": f"w{i} w{i + 1} w{i + 2}"} for i in range(20)])
    settings = {
        "model_name_or_path": "base",
        "dataset_name": "data.jsonl",
        "output_dir": "out",
        "max_steps": 2,
    }
    evaluated = {"test_split_size": 0.25, "eval_strategy": "steps", "eval_steps": 2, "max_length": 64}
    seen, loader = [], SFTTrainer.get_eval_dataloader

    def watch(self, *given):
        seen.append(self.eval_dataset)
        return loader(self, *given)

    monkeypatch.setattr(SFTTrainer, "get_eval_dataloader", watch)
    assert main(["sft", *command_line({**SFT, **settings, **evaluated})]) == 0
    monkeypatch.chdir(tmp_path.parent)  # the file's place is known from anywhere
    saved = read_saved(tmp_path / "out")
    rows = read_rows(None, saved, str(tmp_path / "base"), None, 64)
    assert rows.source == "the run's held-out split" and len(rows.rows) == 5
    expected = sorted(tokenizer().decode(ids) for ids in seen[-1]["input_ids"])
    assert sorted(tokenizer().decode(row["input_ids"][0]) for row in rows.rows) == expected
    capsys.readouterr()
    given = [str(tmp_path / "out"), str(tmp_path / "small"), "--rank", "2", "--base", str(tmp_path / "base")]
    assert main(["export", *given]) == 0
    printed = capsys.readouterr().out
    assert "5 rows of the run's held-out split" in printed and "Rows of the training" not in printed
    assert main(["inspect", str(tmp_path / "out")]) == 0
    loss = next(entry["eval_loss"] for entry in log_history(saved.folder)[::-1] if "eval_loss" in entry)
    assert f"held-out loss {loss:.4g}." in capsys.readouterr().out
    (tmp_path / "data.jsonl").unlink()
    with pytest.warns(UserWarning, match="cannot be read"):
        assert read_rows(None, saved, str(tmp_path / "base"), None, 64) is None
