"""Arguments of the training commands: TRL's as TRL reads them, ours under `structlora:` alone."""

from __future__ import annotations

import os
import warnings
from dataclasses import fields
from importlib import import_module

import pytest
import yaml

from structlora_trl import StructLoRAConfig
from structlora_trl.cli.arguments import parse
from structlora_trl.cli.main import TRAINING
from structlora_trl.trainers.compat import trl_script
from tests.support.cli_runs import SETTINGS, command_line, config_file, skip_where_trl_cannot


@pytest.mark.parametrize("command", TRAINING)
def test_a_file_of_trl_is_read_as_trl_reads_it(command, place, monkeypatch):
    """With a mixture, quantisation and arguments of the launcher in it."""
    skip_where_trl_cannot(command)
    monkeypatch.setenv("SET_BY_FILE", "0")
    mixture = [
        {"path": "data.jsonl", "columns": ["text"]},
        {"path": "json", "data_files": "more.jsonl", "split": "train"},
    ]
    given = {
        **({"num_generations": 4} if command in ("grpo", "rloo") else {}),
        **{
            **SETTINGS,
            "use_peft": True,
            "lora_task_type": "SEQ_CLS",
            "load_in_4bit": True,
            "dtype": "bfloat16",
        },
        **{
            "datasets": mixture,
            "dataset_name": "data.jsonl",
            "eval_strategy": "steps",
            "test_split_size": 0.1,
        },
        **{
            "accelerate_config": "zero2",
            "num_processes": 4,
            "model_init_kwargs": {"attn_implementation": "eager"},
        },
        "env": {"SET_BY_FILE": 1},
    }
    (place / "run.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    words = ["--config", "run.yaml", "--learning_rate", "0.5", "--lora_r", "3"]
    parser = import_module(f"trl.scripts.{command}").make_parser()
    theirs = parser.parse_args_and_config(words, fail_with_unknown_args=False)
    os.environ["SET_BY_FILE"] = "0"
    ours = parse(command, trl_script(command), words)
    for mine, its in zip((ours.script, ours.training, ours.model, ours.mixture), theirs, strict=True):
        assert type(mine) is type(its)
        assert all(getattr(mine, f.name) == getattr(its, f.name) for f in fields(its))
    assert ours.structlora == StructLoRAConfig() and os.environ["SET_BY_FILE"] == "1"
    assert sorted(ours.launcher) == sorted(["--accelerate_config", "zero2", "--num_processes", "4"])


BLOCK = {"beta": 0.6, "edges": "adjacency", "coordinator_lr": "5e-2", "roles": {"my_proj": "read"}}
GIVEN = {
    # under the key in the file, on the command line, what it is (None: plain LoRA)
    "block": (BLOCK, {}, {**BLOCK, "coordinator_lr": 0.05}),
    "both": (BLOCK, {"structlora.beta": 0.7}, {**BLOCK, "coordinator_lr": 0.05, "beta": 0.7}),
    "dotted": ({}, {"structlora.gates": "off", "structlora.roles": "{a: write}"}, {"gates": "off", "roles": {"a": "write"}}),
    "on": (True, {}, {}),
    "file": ("options.yaml", {}, {**BLOCK, "coordinator_lr": 0.05}),
    "file and more": ("options.yaml", {"structlora.beta": 0.7}, {**BLOCK, "coordinator_lr": 0.05, "beta": 0.7}),
    "off": (BLOCK, {"structlora": "false"}, None),
    "off in the file": (False, {}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_options_of_ours(name, place):
    block, words, expected = GIVEN[name]
    (place / "options.yaml").write_text(yaml.safe_dump({"structlora": BLOCK}))
    given = ["--config", config_file(structlora=block, seed=3), *command_line(words)]
    found = parse("sft", trl_script("sft"), given)
    assert found.structlora == (None if expected is None else StructLoRAConfig(**expected))
    assert found.training.seed == 3


def test_a_key_without_a_value_leaves_the_launcher_alone(place):
    given = ["--config", config_file(accelerate_config=None, num_processes=None)]
    assert parse("sft", trl_script("sft"), given).launcher == []


def test_nobody_is_warned_of_what_trl_sets_by_default(place):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        parse("sft", trl_script("sft"), ["--config", config_file()])
