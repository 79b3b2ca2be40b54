"""Each training command on tiny models, as `structlora init` writes its file, and with the reward functions of TRL's scripts."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from types import SimpleNamespace

import pytest
import yaml
from trl import rewards

from structlora_trl import StructLoRAConfig
from structlora_trl.cli import main
from structlora_trl.cli.arguments import parse
from structlora_trl.cli.methods import METHODS
from structlora_trl.cli.rewards import reward_functions
from tests.support.cli_runs import SETTINGS, assert_plain_peft_agrees, command_line, skip_where_trl_cannot, trained
from tests.support.data import better_and_worse, distinct_words, labelled, preferences, prompts, texts, write_rows
from tests.support.jobs import reward_model
from tests.support.left import assert_acted
from tests.support.tiny import tokenizer

SHORT = {"max_completion_length": 6, "num_generations": 4}
WORDS = {"reward_funcs": ["tests.support.data.distinct_words"]}
RUNS = {
    # command: rows of the data, arguments beside those of every tiny run
    "sft": (texts, {"max_length": 32}),
    "dpo": (preferences, {"max_length": 32}),
    "kto": (labelled, {"max_length": 32}),
    "reward": (better_and_worse, {"max_length": 32}),
    "grpo": (prompts, {**SHORT, **WORDS}),
    "rloo": (prompts, {**SHORT, **WORDS, "reward_model_name_or_path": "judge"}),
}


@pytest.mark.parametrize("method", RUNS)
def test_what_init_prints_trains(method, place, monkeypatch, capsys):
    """Three steps of each command: the printed file, with a local model and data in it, on the CPU."""
    skip_where_trl_cannot(method)
    assert main(["init", method]) == 0
    printed = capsys.readouterr().out
    rows, more = RUNS[method]
    write_rows(place / "data.jsonl", rows())
    reward_model().save_pretrained("judge")
    tokenizer().save_pretrained("judge")
    (place / "run.yaml").write_text(printed, encoding="utf-8")
    here = {**SETTINGS, "dataset_name": "data.jsonl", "lora_r": 4, **more}
    trainer = trained(monkeypatch, method, "--config", "run.yaml", *command_line(here))
    assert type(trainer).__name__ == METHODS[method].trainer
    options, _ = assert_acted("out")
    assert options == StructLoRAConfig().options() | {"seed": options["seed"]}
    assert trainer.model.peft_config["default"].lora_alpha == yaml.safe_load(printed)["lora_alpha"]
    if method != "reward":
        assert_plain_peft_agrees(trainer, "out")


@pytest.mark.parametrize("method", RUNS)
def test_a_file_of_trl_is_read_as_trl_reads_it(method, place):
    """With a mixture, quantisation and arguments of the launcher in it."""
    skip_where_trl_cannot(method)
    _, more = RUNS[method]
    mixture = [
        {"path": "data.jsonl", "columns": ["text"]},
        {"path": "json", "data_files": "more.jsonl", "split": "train"},
    ]
    given = {
        **{
            **SETTINGS,
            **more,
            "use_peft": True,
            "lora_task_type": "SEQ_CLS",
            "load_in_4bit": True,
            "dtype": "bfloat16",
        },
        **{"datasets": mixture, "dataset_name": "data.jsonl", "eval_strategy": "steps", "test_split_size": 0.1},
        **{"accelerate_config": "zero2", "num_processes": 4, "model_init_kwargs": {"attn_implementation": "eager"}},
    }
    (place / "run.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    words = ["--config", "run.yaml", "--learning_rate", "0.5", "--lora_r", "3"]
    parser = import_module(f"trl.scripts.{method}").make_parser()
    theirs = parser.parse_args_and_config(words, fail_with_unknown_args=False)
    ours = parse(METHODS[method], METHODS[method].load()[1], words)
    for mine, its in zip(ours[1:5], theirs, strict=True):
        assert type(mine) is type(its)
        assert all(getattr(mine, f.name) == getattr(its, f.name) for f in fields(its))
    assert ours.structlora == StructLoRAConfig() and ours.without_launcher == words
    assert ours.launcher == ["--accelerate_config", "zero2", "--num_processes", "4"]


def test_init_explains_every_option(capsys):
    assert main(["init"]) == 0
    printed = capsys.readouterr().out
    block = yaml.safe_load(printed)["structlora"]
    assert block == StructLoRAConfig().options()
    words = " ".join(line.strip(" #") for line in printed.splitlines())
    for name, option in StructLoRAConfig.__dataclass_fields__.items():
        assert f"{' '.join(option.metadata['help'].split())} {name}: " in words


def test_rewards_by_name_path_and_model(place):
    """As TRL's scripts take them; a path may be of a module in the working directory."""
    (place / "of_mine.py").write_text(
        "def length(completions, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    names = [
        "think_format_reward",
        "get_soft_overlong_punishment",
        "of_mine.length",
        "tests.support.data.distinct_words",
    ]
    given = SimpleNamespace(reward_model_name_or_path="judge", reward_funcs=names)
    judge, think, overlong, length, distinct = reward_functions(given)
    assert (judge, think, distinct) == ("judge", rewards.think_format_reward, distinct_words)
    assert length(["abc"]) == [3.0]
    theirs = rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
    completions = [[0] * count for count in (10, 1100, 1300)]
    assert overlong(completion_ids=completions) == theirs(completion_ids=completions)
