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
from structlora_trl.cli.early import last_checkpoint
from structlora_trl.cli.export import in_words
from structlora_trl.cli.main import TRAINING
from structlora_trl.state import STATE_NAME
from tests.support.cli_runs import SETTINGS, config_file, skip_where_trl_cannot
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


RUN = ["sft", "--config", "run.yaml"]
MISTAKES = [
    # arguments, exit code, words of the message; paths that lead nowhere are in `test_early.py`
    (["stf"], 2, "'sft'"),
    (["init", "stf"], 2, "stf"),
    (["sft", "--structlora.bet", "0.3"], 2, "structlora.beta"),
    (["sft", "--beta", "0.3"], 2, "structlora.beta"),
    (["sft", "--lora_rank", "4"], 2, "`lora_r`"),
    ([*RUN, "stray"], 2, "'stray'"),
    ([*RUN, "--num_proceses", "2"], 2, "num_processes"),
    ([*RUN, "--num_processes"], 2, "--num_processes"),
    ([*RUN, "--structlora.edges", "[a"], 2, "--structlora.edges"),
    (["sft", "--config"], 2, "--config"),
    (["sft", "--config", "empty.yaml"], 1, "empty.yaml"),
    (["sft", "--config", "misspelt.yaml"], 1, "`learning_rate`"),
    (["sft", "--config", "rank.yaml"], 1, "`lora_r`"),
    (["sft", "--config", "beside.yaml"], 1, "structlora.beta"),
    (["sft", "--config", "block.yaml"], 1, "`beta`"),
    (["sft", "--config", "range.yaml"], 1, "beta=-3"),
    (["sft", "--config", "nothing.yaml"], 1, "`structlora:`"),
    (["sft", "--config", "dashes.yaml"], 1, "`learning-rate` in dashes.yaml (did you mean `learning_rate`?)"),
    (["sft", "--config", "negated.yaml"], 1, "(did you mean `packing`?)"),
    (["sft", "--config", "seedless.yaml"], 1, "`seed`"),
    ([*RUN, "--seed", "-1"], 1, "seed=-1"),
    (["sft", "--config", "batchless.yaml"], 1, "per_device_train_batch_size=None"),
    (["sft", "--config", "names.yaml"], 1, "dataset_name=['data.jsonl']"),
    (["sft", "--config", "entry.yaml"], 1, "'pth'"),
    (["sft", "--config", "number.yaml"], 1, "`model_name_or_path` is 5"),
    ([*RUN, "--dataset_streaming", "true", "--test_split_size", "0.5"], 1, "`dataset_streaming`"),
    ([*RUN, "--structlora.beta=-3"], 1, "beta=-3"),
    ([*RUN, "--structlora.edges", "none"], 1, "edges='none'"),
    ([*RUN, "--structlora", "false", "--structlora.keep", "0.3"], 1, "structlora.keep"),
    ([*RUN, "--accelerate_config", "zero9"], 1, "fsdp2"),
    ([*RUN, "--accelerate_config", "fsdp1"], 1, "fsdp2"),
    ([*RUN, "--use_peft", "false"], 1, "`use_peft`"),
    ([*RUN, "--load_in_4bit", "--load_in_8bit"], 1, "4 bit"),
    ([*RUN, "--per_device_train_batch_size", "0"], 1, "per_device_train_batch_size"),
    ([*RUN, "--per_device_eval_batch_size", "0"], 1, "per_device_eval_batch_size"),
    ([*RUN, "--gradient_accumulation_steps", "0"], 1, "gradient_accumulation_steps"),
    ([*RUN, "--output_dir", "run.yaml"], 1, "a file run.yaml"),
    ([*RUN, "--output_dir", "cut"], 1, "--resume_from_checkpoint true"),
    (["sft", "--config", "no_model.yaml"], 1, "model_name_or_path"),
    ([*RUN, "--model_name_or_path", "bass"], 1, "(did you mean ./base?)"),
    (
        [*RUN, "--lora_target_modules", "absent"],
        1,
        "of its linear modules: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj. Fix",
    ),
    ([*RUN, "--lora_target_modules", "q_proj", "v_porj"], 1, "(did you mean v_proj?)"),
    ([*RUN, "--lora_target_modules", ".*absent.*"], 1, ".*absent.*"),
    ([*RUN, "--lora_r", "0"], 1, "lora_r=0"),
    ([*RUN, "--lora_dropout", "1.5"], 1, "lora_dropout=1.5"),
    ([*RUN, "--learning_rate=-1e-4"], 1, "learning_rate=-1e-4"),
    ([*RUN, "--weight_decay=-1"], 1, "weight_decay=-1"),
    ([*RUN, "--test_split_size", "2"], 1, "test_split_size=2"),
    ([*RUN, "--max_steps=-1", "--num_train_epochs", "0"], 1, "num_train_epochs=0"),
    ([*RUN, "--model_name_or_path", "owner/missing"], 1, "hf download owner/missing"),
    ([*RUN, "--dataset_name", "null.jsonl"], 1, "nothing (null) in row 3, column `text`, of null.jsonl"),
    (
        [*RUN, "--dataset_name", "null.jsonl", "--test_split_size", "0.5"],
        1,
        "nothing (null) in row 3, column `text`",
    ),
    (
        [*RUN, "--dataset_name", "numbers.csv"],
        1,
        "4 (int) in row 1, column `completion`, of numbers.csv",
    ),
    ([*RUN, "--dataset_name", "mixed.jsonl"], 1, "7 (int) in row 2, column `text`"),
    (
        [*RUN, "--dataset_name", "turns.jsonl"],
        1,
        "nothing (null) as the `content` of message 1 in row 2, column `messages`",
    ),
    (
        [*RUN, "--dataset_name", "counted.jsonl"],
        1,
        "4 (int) as the `content` of message 1 in row 1, column `messages`",
    ),
    ([*RUN, "--dataset_name", "one.jsonl", "--test_split_size", "0.1"], 1, "test_split_size=0.1 of 1 rows"),
    ([*RUN, "--dataset_name", "no_turns.jsonl"], 1, "[] (list) in row 1, column `messages`"),
    (["sft", "--config", "no_data.yaml"], 1, "dataset_name"),
    ([*RUN, "--dataset_name", "broken.json"], 1, "reading row 1 of broken.json"),
    ([*RUN, "--dataset_name", "blank.csv"], 1, "blank.csv"),
    ([*RUN, "--dataset_name", "./hollow"], 1, "a file without rows in ./hollow"),
    (["sft", "--config", "hollow.yaml"], 1, "a file without rows in empty.jsonl"),
    ([*RUN, "--dataset_name", "header.csv"], 1, "no data"),
    (
        [*RUN, "--dataset_name", "other.csv"],
        1,
        "a, b in the data. Expected the columns messages; or prompt, completion",
    ),
    ([*RUN, "--dataset_train_split", "trian"], 1, "trian"),
    ([*RUN, "--eval_strategy", "steps"], 1, "test_split_size"),
    (["reward", "--config", "run.yaml"], 1, "chosen, rejected"),
    (["grpo", "--config", "online.yaml", "--reward_funcs", "think_format_reward"], 1, "prompt"),
    (["grpo", "--config", "prompts.yaml"], 1, "reward_funcs"),
    (["grpo", "--config", "prompts.yaml", "--reward_funcs", "acuracy_reward"], 1, "accuracy_reward"),
    (["grpo", "--config", "prompts.yaml", "--reward_funcs", "absent.words"], 1, "absent"),
    (["rloo", "--config", "prompts.yaml", "--reward_funcs", "math.words"], 1, "words"),
    ([*RUN, "--output_dir", "cut", "--resume_from_checkpoint", "cut/checkpoint-10"], 1, "cut/checkpoint-2"),
    (
        [*RUN, "--output_dir", "gated", "--structlora", "false", "--resume_from_checkpoint", "true"],
        1,
        "structlora=false",
    ),
    (["sft"], 1, "model_name_or_path"),
    pytest.param(
        [*RUN, "--use_cpu", "false", "--bf16", "true"],
        1,
        "use_cpu: true",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
    ),
]


@pytest.fixture
def spoilt(place):
    """The folder with files that have a mistake each, beside a whole `run.yaml`."""
    config_file()
    config_file("misspelt.yaml", learing_rate=1e-3)
    config_file("rank.yaml", lora_rank=4)
    config_file("no_model.yaml", model_name_or_path=None)
    config_file("beside.yaml", beta=0.7)
    config_file("block.yaml", structlora={"betta": 0.8})
    config_file("range.yaml", structlora={"beta": -3})
    config_file("nothing.yaml", structlora=None)
    config_file("no_data.yaml", dataset_name=None)
    config_file("dashes.yaml", **{"learning-rate": 0.1})
    config_file("negated.yaml", no_packing=True)
    config_file("seedless.yaml", seed=None)
    config_file("batchless.yaml", per_device_train_batch_size=None)
    config_file("names.yaml", dataset_name=["data.jsonl"])
    config_file("entry.yaml", dataset_name=None, datasets=[{"pth": "data.jsonl"}])
    config_file("number.yaml", model_name_or_path=5)
    config_file("hollow.yaml", dataset_name=None, datasets=[{"path": "json", "data_files": "empty.jsonl"}])
    for name, data in [("online", "data"), ("prompts", "prompts")]:
        online = {**SETTINGS, "dataset_name": f"{data}.jsonl", "num_generations": 4}
        Path(f"{name}.yaml").write_text(yaml.safe_dump(online), encoding="utf-8")
    write_rows(place / "prompts.jsonl", [{"prompt": "a"}] * 8)
    write_rows(place / "null.jsonl", [{"text": "a"}, {"text": "b"}, {"text": None}, {"text": "d"}])
    write_rows(place / "mixed.jsonl", [{"text": "a"}, {"text": 7}])
    write_rows(place / "no_turns.jsonl", [{"messages": []}])
    turns = [[{"role": "user", "content": text}] for text in ("a", None)]
    write_rows(place / "turns.jsonl", [{"messages": turn} for turn in turns])
    write_rows(place / "counted.jsonl", [{"messages": [{"role": "user", "content": 4}]}])
    write_rows(place / "one.jsonl", [{"text": "a"}])
    Path("numbers.csv").write_text("prompt,completion\n2+2=,4\n")
    Path("empty.yaml").write_text("")
    Path("broken.json").write_text("{nothing")
    Path("empty.jsonl").write_text("")
    Path("blank.csv").write_text("\n\n")
    Path("header.csv").write_text("text\n")
    Path("other.csv").write_text("a,b\n1,2\n")
    (place / "hollow").mkdir()
    (place / "hollow" / "rows.json").write_text("")
    for file in (
        "cut/checkpoint-2/trainer_state.json",
        "cut/checkpoint-10/README.md",
        "gated/checkpoint-2/trainer_state.json",
        f"gated/checkpoint-2/{STATE_NAME}",
    ):
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_text("{}")


@pytest.mark.parametrize("arguments, code, words", MISTAKES)
def test_every_mistake_gets_a_message(arguments, code, words, spoilt, capsys):
    if arguments[0] in TRAINING:
        skip_where_trl_cannot(arguments[0])
    found = main(arguments)
    message = capsys.readouterr().err
    assert found == code and words in message and "Traceback" not in message, message


def test_true_resumes_from_the_last_whole_checkpoint(spoilt):
    assert last_checkpoint("true", "cut") == last_checkpoint(True, "cut") == "cut/checkpoint-2"
