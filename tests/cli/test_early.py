"""What is refused before a library is imported, and the file to start from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from peft.utils import CONFIG_NAME
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME

from structlora_trl.cli import early, main
from structlora_trl.cli.init import template
from structlora_trl.cli.main import TRAINING
from structlora_trl.errors import StructLoRAError
from structlora_trl.local_data import count_rows
from tests.support.data import write_rows
from tests.support.launching import ROOT

GOOD = {"model_name_or_path": "a/hub-model", "dataset_name": "rows.jsonl", "output_dir": "out"}
WRONG = {
    # what is wrong: the file (text, or keys beside good ones), words of the command line, words of the message
    "no file": (None, "--config gone.yaml", ["gone.yaml", "after `--config`"]),
    "no keys": ("", "", ["run.yaml without keys"]),
    "bracket": ("a: [1\nb: 2", "", ['"run.yaml", line 2, column 2', "quotation mark"]),
    "tab": ("a:\n\tb: 1\n", "", ['"run.yaml", line 2, column 1', "tabs"]),
    "data": ({"dataset_name": "gone.jsonl"}, "", ["no file gone.jsonl"]),
    "data in words": ({}, "--dataset_name=row.jsonl", ["did you mean ./rows.jsonl?"]),
    "folder of data": ({"dataset_name": "./gone"}, "", ["no folder gone"]),
    "upper case": ({"dataset_name": "GONE.JSONL"}, "", ["no file GONE.JSONL"]),
    "mixture": ({"datasets": [{"path": "gone.csv"}, "rows.jsonl"]}, "", ["no file gone.csv"]),
    "empty": ({"datasets": ["empty.jsonl"]}, "", ["empty.jsonl empty"]),
    "model": ({"model_name_or_path": "./gone"}, "", ["no folder ./gone", "model_name_or_path"]),
    "number": ({"model_name_or_path": 5}, "", ["`model_name_or_path` is 5", "model of the hub"]),
    "adapter": ({}, "--model-name-or-path ./done", ["an adapter in ./done", "--merge"]),
    "output": ({"output_dir": "done"}, "", ["earlier run in output_dir=done", "--overwrite"]),
    "checkpoints": (
        {},
        "--output_dir cut",
        ["earlier run in output_dir=cut", "--resume_from_checkpoint true"],
    ),
    "output a file": ({}, "--output_dir rows.jsonl/out", ["a file rows.jsonl, above rows.jsonl/out"]),
    "option": ({"structlora": {"gate": "off"}}, "", ["an unknown option `gate`", "write `gates`"]),
    "value": ({"structlora": {"gates": "maybe"}}, "", ["gates='maybe'"]),
    "value in words": ({}, "--structlora.keep 0", ["keep=0"]),
    "nothing": ({"structlora": None}, "", ["`structlora:` with nothing under it"]),
    "block": ({"structlora": "on please"}, "", ["'on please' for `structlora`"]),
    "off and on": ({"structlora": False}, "--structlora.keep 0.5", ["structlora=false", "structlora.keep"]),
    "resume": ({"resume_from_checkpoint": True}, "", ["no whole checkpoint in out"]),
    "resume elsewhere": ({}, "--resume_from_checkpoint gone", ["no whole checkpoint at gone"]),
    "resume a broken one": (
        {"output_dir": "cut"},
        "--resume_from_checkpoint cut/checkpoint-10",
        ["set `resume_from_checkpoint: cut/checkpoint-2`"],
    ),
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_rows(tmp_path / "rows.jsonl", [{"text": "a"}] * 8)
    Path("empty.jsonl").write_text("")
    for name in ("done", "a/lora"):
        Path(name).mkdir(parents=True)
        Path(name, CONFIG_NAME).write_text("{}")
    for name in ("cut/checkpoint-2/trainer_state.json", "cut/checkpoint-10/README.md"):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text("{}")


def _write(given: dict | str | None) -> None:
    if given is not None:
        text = given if isinstance(given, str) else yaml.safe_dump({**GOOD, **given})
        Path("run.yaml").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told(name, files):
    given, words, expected = WRONG[name]
    _write(given)
    with pytest.raises(StructLoRAError) as error:
        early.check(["--config", "run.yaml", *words.split()])
    assert all(part in str(error.value) for part in expected), error.value


COSTS_NOTHING = {
    # the command: words of the message
    "sft": "no model (`model_name_or_path` is None)",
    "sft --config run.yaml": "no file gone.jsonl",
    "export a/lora out --rank 2 --base ./don": "correct `--base` (did you mean ./done?)",
    "inspect a/lora --html a.html --data rows.jsonl --base ./don": "correct `--base`",
    "export a/lora out --for vlm": "a server 'vlm'",
    "init --model ./don": "correct `--model` (did you mean ./done?)",
    "init --data gone.csv": "no file gone.csv",
    "inspect .": "no adapter_config.json in .",
    "export a/lora out --rank 2 --data row.jsonl.gz": "did you mean ./rows.jsonl?",
    "export a/lora out --keep 25": "`keep` 25",
    "export a/lora out --split test": "`split` without `data`",
    "export a/lora a/lora": "a/lora, which is not empty",
}


@pytest.mark.parametrize("words", COSTS_NOTHING)
def test_it_costs_no_library(words, files):
    """Torch and what is built on it take ten seconds and more."""
    _write({"dataset_name": "gone.jsonl"})
    Path("done", CONFIG_NAME).unlink()
    libraries = ("numpy", "torch", "transformers", "peft", "trl", "datasets")
    code = (
        "import json, sys; from structlora_trl.cli import main; code = main(sys.argv[1:]); "
        f"print(json.dumps([code, [n for n in {libraries} if n in sys.modules]]))"
    )
    command = [sys.executable, "-c", code, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert json.loads(done.stdout.splitlines()[-1]) == [1, []], done.stderr
    assert COSTS_NOTHING[words] in done.stderr


@pytest.mark.parametrize(
    "given, words",
    [
        ({}, "--learning_rate 1e-4"),
        ({"output_dir": "done"}, "--overwrite"),
        ({"output_dir": "done", "overwrite": True}, ""),
        ({"output_dir": "cut", "resume_from_checkpoint": True}, ""),
        ({"model_name_or_path": None}, "--model-name-or-path a/hub-model"),
        ({"structlora": {"gates": "off"}}, "--structlora.coordinator gat"),
        ({"structlora": {"gates": "maybe"}}, "--structlora false"),
        ({"dataset_name": "gone.jsonl"}, "--help"),
    ],
)
def test_what_is_right_passes(given, words, files):
    _write(given)
    early.check(["--config", "run.yaml", *words.split()])


def test_true_resumes_from_the_last_whole_checkpoint(files):
    assert early.last_checkpoint("true", "cut") == early.last_checkpoint(True, "cut") == "cut/checkpoint-2"


def test_names_of_files_are_those_of_the_libraries():
    assert early.ADAPTER_CONFIG == CONFIG_NAME and early.TRAINER_STATE == TRAINER_STATE_NAME
    assert early.MODEL_CONFIG == MODEL_CONFIG_NAME


@pytest.mark.parametrize("name", TRAINING)
def test_the_file_to_start_from_is_short_and_says_what_a_run_needs(name):
    short, whole = template(name), template(name, all_options=True)
    options, more = yaml.safe_load(short), yaml.safe_load(whole)
    assert len(short.splitlines()) <= 20 and options.pop("structlora") is True
    assert {"beta", "coordinator"} <= more.pop("structlora").keys()
    assert options == more and isinstance(options["learning_rate"], float)
    assert {*GOOD, "learning_rate", "lora_r", "num_train_epochs"} <= options.keys()


EPOCHS = {
    # rows: epochs, held out, evaluation
    40: (5, 0.2, "epoch"),
    300: (4, 0.2, "epoch"),
    800: (3, 0.1, "epoch"),
    5000: (1, 0.05, "steps"),
}


@pytest.mark.parametrize("count", EPOCHS)
def test_epochs_and_held_out_rows_fit_the_data(count, files):
    write_rows(Path("mine.jsonl"), [{"text": "a"}] * count)
    options = yaml.safe_load(template("sft", "mine.jsonl", "./base"))
    found = options["num_train_epochs"], options["test_split_size"], options["eval_strategy"]
    assert found == EPOCHS[count]
    assert (options["dataset_name"], options["model_name_or_path"]) == ("mine.jsonl", "./base")
    assert "dataset_train_split" not in options


def test_init_looks_at_the_rows(files, capsys):
    assert main(["init", "dpo", "--data", "rows.jsonl"]) == 1
    assert "the columns text in rows.jsonl" in capsys.readouterr().err


def test_rows_are_counted_in_every_kind_of_file(files):
    rows = [{"text": "two\nlines"}, {"text": "b"}, {"text": "c"}]
    Path("list.json").write_text(json.dumps(rows, indent=1))
    Path("folder").mkdir()
    write_rows(Path("folder", "a.jsonl"), rows)
    Dataset.from_list(rows).to_csv("a.csv")
    Dataset.from_list(rows).to_parquet("a.parquet")
    names = ("folder/a.jsonl", "folder", "list.json", "a.csv", "a.parquet")
    assert [count_rows(name, "sft") for name in names] == [3] * len(names)
    assert count_rows("owner/set", "sft") is None
