"""The entry point: help that needs no library, exit codes, and a message in place of a traceback for each mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from structlora_trl import __version__
from structlora_trl.cli import main
from structlora_trl.cli.export import in_words
from tests.support.cli_runs import SETTINGS, SFT, config_file, skip_where_trl_cannot
from tests.support.data import write_rows
from tests.support.launching import ROOT

LIGHT = {
    # arguments: exit code, words of the output
    "--version": (0, __version__),
    "--help": (0, "inspect"),
    "": (2, "structlora sft --config"),
    "init": (0, "structlora:"),
    "--local-rank 0 init": (0, "structlora:"),
    "init --help": (0, "run.yaml"),
    "inspect --help": (0, "--html"),
    "export --help": (0, "--prune"),
}


@pytest.mark.parametrize("words", LIGHT)
def test_what_must_come_at_once_imports_no_library(words):
    code = (
        "import json, sys; from structlora_trl.cli import main; code = main(sys.argv[1:]); "
        "print(json.dumps([code, [n for n in ('numpy', 'torch', 'transformers', 'peft', 'trl') if n in sys.modules]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()], capture_output=True, text=True, cwd=ROOT
    )
    code, expected = LIGHT[words]
    assert json.loads(done.stdout.splitlines()[-1]) == [code, []], done.stderr
    assert expected in done.stdout


def test_help_of_a_training_command_has_arguments_of_both(capsys):
    assert main(["sft", "--help"]) == 0
    assert {"--structlora.beta", "--learning_rate"} <= {*capsys.readouterr().out.split()}


def test_counts_in_words_round_up_to_the_next_one():
    counts = {999: "999 B", 999_499: "999 kB", 999_936: "1 MB", 1_234_567: "1.23 MB", 999_999_999: "1 GB"}
    assert {count: in_words(count, "B") for count in counts} == counts
    assert in_words(999_936) == "1 million"


def test_a_reader_that_has_closed_the_output():
    """As in `structlora inspect out | head`: no traceback, and the exit code of SIGPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "structlora_trl.cli", "init"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


USAGE = {
    # the command: words of the message
    "stf": "'sft'",
    "init stf": "stf",
    "sft --structlora.bet 0.3": "structlora.beta",
    "sft --beta 0.3": "structlora.beta",
    "sft --lora_rank 4": "`lora_r`",
    "sft --config": "--config",
    "sft --config run.yaml stray": "'stray'",
    "sft --config run.yaml --num_proceses 2": "num_processes",
    "sft --config run.yaml --num_processes": "--num_processes",
    "sft --config run.yaml --structlora.edges [a": "--structlora.edges",
}


@pytest.mark.parametrize("words", USAGE)
def test_a_command_line_that_cannot_be_read(words, place, capsys):
    config_file()
    assert main(words.split()) == 2
    assert USAGE[words] in capsys.readouterr().err


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
ONLINE = {"num_generations": 4, "dataset_name": "prompts.jsonl"}
MISTAKES = [
    # arguments on the command line, in the file, words of the message; what needs no library: `test_early.py`
    ("", {"learing_rate": 1}, "`learing_rate` in run.yaml (did you mean `learning_rate`?)"),
    ("", {"lora_rank": 4}, "`lora_r`"),
    ("", {"learning-rate": 0.1}, "(did you mean `learning_rate`?)"),
    ("", {"no_packing": True}, "(did you mean `packing`?)"),
    ("", {"beta": 0.7}, "structlora.beta"),
    ("", {"dataset_name": ["data.jsonl"]}, "dataset_name=['data.jsonl']"),
    ("", {"dataset_name": None}, "dataset_name=None"),
    ("", {"model_name_or_path": None}, "model_name_or_path"),
    ("", {"datasets": [{"pth": "data.jsonl"}]}, "'pth'"),
    # Values: the libraries tell of these.
    ("--load_in_4bit --load_in_8bit", {}, "4 bit"),
    ("--seed -1", {}, "Seed must be"),
    ("--per_device_train_batch_size 0", {}, "batch_size"),
    ("--learning_rate=-1e-4", {}, "learning rate: -0.0001"),
    ("--lora_r 0", {}, "`r` should be a positive integer"),
    ("--lora_dropout 1.5", {}, "dropout probability"),
    ("--test_split_size 2", {}, "test_size=2"),
    ("--lora_target_modules absent", {}, "absent"),
    ("--model_name_or_path owner/missing", {}, "owner/missing"),
    ("--dataset_streaming true --test_split_size 0.5", {}, "train_test_split"),
    pytest.param("--use_cpu false --bf16 true", {}, "use_cpu: true", marks=NO_GPU),
    # Values that they pass over, or tell of less plainly.
    ("--use_peft false", {}, "`use_peft`"),
    ("--accelerate_config zero9", {}, "fsdp2"),
    ("--model_name_or_path bass", {}, "(did you mean ./base?)"),
    ("--lora_target_modules q_proj v_porj", {}, "lora_target_modules=['v_porj'] without a module"),
    ("--dataset_train_split trian", {}, 'Unknown split "trian"'),
    ("--eval_strategy steps", {}, "test_split_size"),
    ("grpo", ONLINE, "reward_funcs"),
    ("grpo --reward_funcs acuracy_reward", ONLINE, "accuracy_reward"),
    ("rloo --reward_funcs math.words", ONLINE, "words"),
    # Rows.
    ("reward", {}, "the columns chosen, rejected"),
    ("grpo --dataset_name data.jsonl --reward_funcs think_format_reward", ONLINE, "the columns prompt"),
    (
        "--dataset_name other.csv",
        {},
        "a, b in other.csv. Expected the columns messages; or prompt, completion",
    ),
    ("--dataset_name null.jsonl", {}, "nothing (null) in row 3, column `text`, of null.jsonl"),
    ("--dataset_name null.jsonl --test_split_size 0.5", {}, "nothing (null) in row 3"),
    ("--dataset_name numbers.csv", {}, "4 (int) in row 1, column `completion`, of numbers.csv"),
    ("--dataset_name turns.jsonl", {}, "in row 2, column `messages`, of turns.jsonl"),
    ("--dataset_name no_turns.jsonl", {}, "[] (list) in row 1, column `messages`"),
    ("--dataset_name broken.jsonl", {}, "reading broken.jsonl failed"),
    ("--dataset_name header.csv", {}, "reading header.csv failed"),
    ("--dataset_name ./hollow", {}, "reading ./hollow failed"),
    ("--dataset_name owner/missing", {}, "reading owner/missing failed"),
]


@pytest.fixture
def spoilt(place):
    """The folder with files of rows that have a mistake each."""
    write_rows(place / "prompts.jsonl", [{"prompt": "a"}] * 8)
    write_rows(place / "null.jsonl", [{"text": "a"}, {"text": "b"}, {"text": None}, {"text": "d"}])
    write_rows(place / "no_turns.jsonl", [{"messages": []}])
    turns = [[{"role": "user", "content": text}] for text in ("a", None)]
    write_rows(place / "turns.jsonl", [{"messages": turn} for turn in turns])
    Path("numbers.csv").write_text("prompt,completion\n2+2=,4\n")
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": "b\n')
    Path("header.csv").write_text("text\n")
    Path("other.csv").write_text("a,b\n1,2\n")
    Path("hollow").mkdir()
    Path("hollow", "rows.json").write_text("")


@pytest.mark.parametrize("words, in_file, expected", MISTAKES)
def test_every_mistake_gets_a_message(words, in_file, expected, spoilt, capsys):
    command, *words = words.split() if words[:1].isalpha() else ["sft", *words.split()]
    skip_where_trl_cannot(command)
    given = {**(SETTINGS if command == "grpo" or command == "rloo" else SFT), **in_file}
    Path("run.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    assert main([command, "--config", "run.yaml", *words]) == 1
    message = capsys.readouterr().err
    assert expected in message and "Traceback" not in message, message
