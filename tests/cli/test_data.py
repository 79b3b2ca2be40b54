"""Local data of every kind, as TRL's scripts then load it."""

from __future__ import annotations

import gzip
import json

import pytest
from datasets import Dataset
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from structlora_trl.cli.data import as_mixture, sources
from tests.support.cli_runs import assert_plain_peft_agrees, config_file, trained
from tests.support.data import chats, save_base, save_pictures, texts, write_rows
from tests.support.left import assert_acted, state_of


def _one_file(suffix):
    def write(folder):
        rows = Dataset.from_list(texts())
        {"json": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](
            folder / f"rows.{suffix}"
        )
        return {"dataset_name": f"rows.{suffix}"}

    return write


def _folder(folder):
    (folder / "rows").mkdir()
    for split in ("train", "test"):
        write_rows(folder / "rows" / f"{split}.jsonl", texts())
    return {"dataset_name": "rows", "eval_strategy": "steps", "eval_steps": 1}


def _mixture(folder):
    write_rows(folder / "more.jsonl", texts())
    mixture = [{"path": "data.jsonl"}, {"path": "json", "data_files": "more.jsonl", "split": "train"}]
    return {"dataset_name": None, "datasets": mixture, "test_split_size": 0.25, "eval_strategy": "steps"}


def _array(folder):
    (folder / "rows.json").write_text(json.dumps(chats()))
    return {"dataset_name": "rows.json", "test_split_size": 0.25, "eval_strategy": "steps", "eval_steps": 1}


def _names(folder):
    write_rows(folder / "more.jsonl", texts())
    names = {"dataset_name": None, "datasets": ["data.jsonl", "more.jsonl"]}
    return {**names, "lora_target_modules": ["self_attn.q_proj"]}


def _packed(folder):
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress((folder / "data.jsonl").read_bytes()))
    return {"dataset_name": "rows.jsonl.gz"}


DATA = {
    "packed": _packed,
    **{suffix: _one_file(suffix) for suffix in ("json", "csv", "parquet")},
    "folder": _folder,
    "split folder": lambda folder: {**_folder(folder), "test_split_size": 0.25},
    "mixture": _mixture,
    "names": _names,
    "array": _array,
}


@pytest.mark.parametrize("kind", DATA)
def test_local_data(kind, place, monkeypatch):
    options = DATA[kind](place)
    trainer = trained(monkeypatch, "sft", "--config", config_file(**options))
    assert (trainer.eval_dataset is not None) == ("eval_strategy" in options)
    if "eval_strategy" in options:
        assert any("eval_loss" in entry for entry in trainer.state.log_history)
        held_out = len(trainer.eval_dataset) / (len(trainer.train_dataset) + len(trainer.eval_dataset))
        assert held_out == options.get("test_split_size", 0.5)
    assert_acted("out")
    assert_plain_peft_agrees(trainer.model, "out")


def test_the_mixture_wins_over_the_name_as_in_trl(place, monkeypatch):
    options = {**_mixture(place), "dataset_name": "absent.jsonl"}
    trainer = trained(monkeypatch, "sft", "--config", config_file(**options))
    assert len(trainer.train_dataset) == 36


@pytest.mark.parametrize("ending", [".jsonl", ".tsv", ".txt"])
def test_a_file_is_read_by_its_name_and_not_by_a_pattern(ending, place):
    for name, text in (("rows[1]", "this"), ("rows1", "another")):
        lines = {".jsonl": json.dumps({"text": text}), ".tsv": f"text\n{text}", ".txt": text}
        (place / f"{name}{ending}").write_text(lines[ending])
    script, mixture = ScriptArguments(dataset_name=f"rows[1]{ending}"), DatasetMixtureConfig()
    assert sources(script, mixture) == [f"rows[1]{ending}"]
    as_mixture(script, mixture)
    assert get_dataset(mixture)["train"]["text"][:] == ["this"]


def test_llava_with_pictures(place, monkeypatch):
    """A folder of pictures and their metadata.jsonl."""
    save_base(place / "llava", "llava")
    save_pictures(place / "pictures")
    options = {"model_name_or_path": "llava", "dataset_name": "pictures", "max_length": None}
    trainer = trained(
        monkeypatch, "sft", "--config", config_file(**options, lora_target_modules=["q_proj", "v_proj"])
    )
    _, state = state_of("out")
    assert any("vision_tower" in name for name in state)
    assert_acted("out")
    assert_plain_peft_agrees(trainer.model, "out", "llava")


def test_where_rows_come_from_names_each_file():
    """As the report page and errors say it."""
    files = {"path": "json", "data_files": ["a.jsonl", "b.jsonl"]}
    mixture = DatasetMixtureConfig(datasets=[files, {"path": "owner/set"}, "c.jsonl"])
    assert sources(ScriptArguments(), mixture) == ["a.jsonl", "b.jsonl", "owner/set", "c.jsonl"]
