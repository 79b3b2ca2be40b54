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
from structlora_trl.cli.local_rows import count_rows
from structlora_trl.cli.main import TRAINING
from tests.support.data import write_rows
from tests.support.launching import ROOT

GOOD = {"model_name_or_path": "a/hub-model", "dataset_name": "rows.jsonl", "output_dir": "out"}
WRONG = {
    # what is wrong: the file (text, or keys beside good ones), words of the command line, words of the message
    "no file": (None, ["--config", "gone.yaml"], ["gone.yaml", "after `--config`"]),
    "bracket": ("a: [1\nb: 2", [], ["line 2, column 2 of run.yaml", "`a: [1` / `b: 2`"]),
    "tab": ("a:\n\tb: 1\n", [], ["line 2, column 1 of run.yaml", "tabs"]),
    "quote": ("a: 'x\nb: 1\n", [], ["line 1, column 4 of run.yaml", "quotation mark"]),
    "data": ({"dataset_name": "gone.jsonl"}, [], ["no file gone.jsonl"]),
    "data in words": ({}, ["--dataset_name=gone.jsonl"], ["no file gone.jsonl"]),
    "folder of data": ({"dataset_name": "./gone"}, [], ["no folder ./gone"]),
    "upper case": ({"dataset_name": "GONE.JSONL"}, [], ["no file GONE.JSONL"]),
    "mixture": ({"datasets": [{"path": "gone.csv"}, "rows.jsonl"]}, [], ["no file gone.csv"]),
    "empty": ({"dataset_name": "empty.jsonl"}, [], ["empty.jsonl empty"]),
    "model": ({"model_name_or_path": "./gone"}, [], ["no folder ./gone", "model_name_or_path"]),
    "adapter": ({}, ["--model_name_or_path", "./done"], ["an adapter in ./done", "--merge"]),
    "output": ({"output_dir": "done"}, [], ["earlier run in output_dir=done", "--overwrite"]),
    "output a file": ({}, ["--output_dir", "rows.jsonl/out"], ["a file rows.jsonl, above rows.jsonl/out"]),
    "no model": ({"model_name_or_path": None}, [], ["`model_name_or_path` is None", "model of the hub"]),
    "word": ({"num_train_epochs": "three"}, [], ["num_train_epochs=three", "above 0"]),
    "option": ({"structlora": {"gate": "off"}}, [], ["an unknown option `gate`", "write `gates`"]),
    "value": ({"structlora": {"gates": "maybe"}}, [], ["gates='maybe'"]),
    "value in words": ({}, ["--structlora.keep", "0"], ["keep=0"]),
    "block": ({"structlora": "on please"}, [], ["'on please' for `structlora`"]),
    "off and on": (
        {"structlora": False},
        ["--structlora.gates", "gumbel"],
        ["structlora=false", "structlora.gates"],
    ),
    "line": ({"dataset_name": "cut.jsonl"}, [], ["reading row 2 of cut.jsonl", "correct the line"]),
    "columns": ({"dataset_name": "other.csv"}, [], ["the columns question, answer"]),
    "cell": ({"datasets": ["rows.jsonl", "hole.csv"]}, [], ["row 2, column `completion`, of hole.csv"]),
    "near": ({"dataset_name": "row.jsonl"}, [], ["did you mean ./rows.jsonl?"]),
    "rate": ({"learning_rate": "-1e-4"}, [], ["learning_rate=-1e-4", "above 0"]),
    "rate in words": ({}, ["--learning_rate", "-2e-4"], ["learning_rate=-2e-4", "above 0"]),
    "alpha": ({}, ["--lora_alpha", "0"], ["lora_alpha=0", "lora_alpha / lora_r"]),
    "epochs": ({"num_train_epochs": 0}, ["--max_steps", "-1"], ["num_train_epochs=0", "above 0"]),
    "key": ({"learning_rat": 1}, [], ["`learning_rat` in run.yaml (did you mean `learning_rate`?)"]),
    "key of the model": (
        "modle_name_or_path: a/b\ndataset_name: rows.jsonl\n",
        [],
        ["`modle_name_or_path` in run.yaml (did you mean `model_name_or_path`?)"],
    ),
    "tabs": ({}, ["--dataset_name", "rows.tsv"], ["rows.tsv as rows to train on. Expected a file that ends"]),
    "resume": ({"resume_from_checkpoint": True}, [], ["no whole checkpoint in out"]),
    "resume elsewhere": ({}, ["--resume_from_checkpoint", "gone"], ["no whole checkpoint at gone"]),
}
LIBRARIES = ("numpy", "torch", "transformers", "peft", "trl", "datasets")


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"text": "a"}] * 8)
    Path("empty.jsonl").write_text("\n")
    Path("cut.jsonl").write_text('{"text": "a"}\n{"text": "b\n')
    Path("other.csv").write_text("question,answer\na,b\n")
    Path("list.jsonl").write_text('[{"text": "a"}]')
    Path("hole.csv").write_text("prompt,completion\na,b\nc,\n")
    Path("rows.tsv").write_text("text\na\n")
    for name in ("done", "a/lora"):
        Path(name).mkdir(parents=True)
        Path(name, CONFIG_NAME).write_text("{}")
    return tmp_path


def _write(given: dict | str | None) -> None:
    if given is not None:
        text = given if isinstance(given, str) else yaml.safe_dump({**GOOD, **given})
        Path("run.yaml").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_path_is_told(name, files, capsys):
    given, words, expected = WRONG[name]
    _write(given)
    assert main(["sft", "--config", "run.yaml", *words]) == 1
    message = capsys.readouterr().err
    assert all(part in message for part in expected) and "Traceback" not in message, message


COSTS_NOTHING = {
    # the command, its exit code, words of the message; the file of the same name in WRONG
    **{
        n: ("sft --config run.yaml " + " ".join(WRONG[n][1]), 1, WRONG[n][2][0])
        for n in ("data", "alpha", "no model", "option", "value in words", "line", "cell")
    },
    "nothing": ("sft", 1, "no model (`model_name_or_path` is None)"),
    "base": ("export a/lora out --rank 2 --base ./don", 1, "correct `--base` (did you mean ./done?)"),
    "base of figures": ("inspect a/lora --html a.html --data rows.jsonl --base ./don", 1, "correct `--base`"),
    "server": ("export a/lora out --for vlm", 1, "a server 'vlm'"),
    "model of a file": ("init --model ./don", 1, "correct `--model` (did you mean ./done?)"),
    "inspect": ("inspect .", 1, "no adapter_config.json in ."),
    "columns": ("init dpo --data rows.jsonl", 1, "the columns text in the data"),
    "rows": ("export a/lora out --rank 2 --data row.jsonl", 1, "did you mean ./rows.jsonl?"),
    "packed rows": ("export a/lora out --rank 2 --data row.jsonl.gz", 1, "did you mean ./rows.jsonl?"),
    "rows in upper case": ("export a/lora out --rank 2 --data OTHERS.TSV", 1, "no file OTHERS.TSV"),
    "share": ("export a/lora out --keep 25", 1, "`keep` 25"),
    "no effect": ("export a/lora out --split test", 1, "`split` without `data`"),
    "full folder": ("export a/lora a/lora", 1, "a/lora, which is not empty"),
}


@pytest.mark.parametrize("name", COSTS_NOTHING)
def test_it_costs_no_library(name, files):
    """Torch and what is built on it take ten seconds and more."""
    words, exit_code, expected = COSTS_NOTHING[name]
    _write(WRONG[name][0] if name in WRONG else None)
    Path("done", CONFIG_NAME).unlink()
    code = (
        "import json, sys; from structlora_trl.cli import main; code = main(sys.argv[1:]); "
        f"print(json.dumps([code, [n for n in {LIBRARIES} if n in sys.modules]]))"
    )
    command = [sys.executable, "-c", code, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert json.loads(done.stdout.splitlines()[-1]) == [exit_code, []], done.stderr
    assert expected in done.stderr


@pytest.mark.parametrize(
    "given, words",
    [
        ({}, []),
        ({"output_dir": "done"}, ["--overwrite"]),
        ({"output_dir": "done", "overwrite": True}, []),
        ({"num_train_epochs": 0}, ["--max_steps", "100"]),
        ({"model_name_or_path": None}, ["--model-name-or-path", "a/hub-model"]),
        ({"dataset_name": "other.csv"}, ["--dataset_text_field", "answer"]),
        ({"dataset_name": "list.jsonl"}, []),  # one list, which `datasets` reads
        ({"datasets": [{"path": "other.csv", "columns": ["answer"]}]}, []),
        ({"structlora": {"gates": "off"}}, ["--structlora.coordinator", "gat"]),
        ({"structlora": {"gates": "maybe"}}, ["--structlora", "false"]),
    ],
)
def test_what_is_right_passes(given, words, files):
    _write(given)
    early.check("sft", ["--config", "run.yaml", "--learning_rate", "1e-4", *words])


@pytest.mark.parametrize(
    "value, name, is_told", [("1", "a/model", True), ("0", "a/model", False), ("true", "./done", False)]
)
def test_a_hub_that_the_environment_keeps_out_of_reach_is_told(value, name, is_told, files, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert ("HF_HUB_OFFLINE" in early.if_offline(name)) == is_told


def test_names_of_files_are_those_of_the_libraries():
    assert early.ADAPTER_CONFIG == CONFIG_NAME and early.TRAINER_STATE == TRAINER_STATE_NAME
    assert early.MODEL_CONFIG == MODEL_CONFIG_NAME


@pytest.mark.parametrize("name", TRAINING)
def test_the_file_to_start_from_is_short_and_says_what_a_run_needs(name):
    short, whole = template(name), template(name, all_options=True)
    options, more = yaml.safe_load(short), yaml.safe_load(whole)
    assert len(short.splitlines()) <= 20 and options["structlora"] is True
    assert {"beta", "coordinator"} <= more.pop("structlora").keys()
    options.pop("structlora")
    assert options == more
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
    write_rows(files / "mine.jsonl", [{"text": "a"}] * count)
    options = yaml.safe_load(template("sft", "mine.jsonl", "./base"))
    found = options["num_train_epochs"], options["test_split_size"], options["eval_strategy"]
    assert found == EPOCHS[count]
    assert (options["dataset_name"], options["model_name_or_path"]) == ("mine.jsonl", "./base")
    assert "dataset_train_split" not in options


BAD_ROWS = {
    # file: its text, words of the message
    "null.jsonl": (
        '{"text": "a"}\n\n{"text": null}',
        "nothing (null) in row 2, column `text`, of null.jsonl",
    ),
    "number.json": (
        '[{"messages": [{"role": "user", "content": 4}]}]',
        "4 (int) as the `content` of message 1 in row 1",
    ),
    "other.csv": ("question,answer\na,b\n", "the columns question, answer in the data"),
    "hole.csv": ("prompt,completion\na,b\nc,\n", "nothing (null) in row 2, column `completion`"),
    "broken.jsonl": ('{"text": "a"}\n{"text"\n', "reading row 2 of broken.jsonl"),
    "list.jsonl": ("[1]\n", "row 1 of list.jsonl to be 1 (int)"),
    "texts.json": ('["a", "b"]', "row 1 of texts.json to be 'a' (str)"),
    "one.jsonl": ('{"text": "a"}\n', "1 rows in one.jsonl"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_init_looks_at_the_rows(name, files, capsys):
    text, expected = BAD_ROWS[name]
    Path(name).write_text(text)
    assert main(["init", "--data", name]) == 1
    assert expected in capsys.readouterr().err


def test_rows_are_counted_in_every_kind_of_file(files):
    rows = [{"text": "two\nlines"}, {"text": "b"}, {"text": "c"}]
    write_rows(files / "a.jsonl", rows)
    write_rows(files / "b.JSONL", rows)
    Path("a.json").write_text(json.dumps(rows, indent=1))
    Dataset.from_list(rows).to_csv("a.csv")
    Dataset.from_list(rows).to_parquet("a.parquet")
    names = ("a.jsonl", "b.JSONL", "a.json", "a.csv", "a.parquet")
    assert [count_rows(name) for name in names] == [3] * len(names)
    assert count_rows("owner/set") is None and count_rows("./done") is None
