"""The training commands on tiny models: what each leaves behind, and how a run goes on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import Trainer

from structlora_trl import StructLoRAConfig
from structlora_trl.cli import main
from structlora_trl.model_card import HEADING, TAG
from structlora_trl.shrink.inspecting import command_facts
from structlora_trl.state import STATE_NAME
from tests.support.cli_runs import (
    SETTINGS,
    assert_plain_peft_agrees,
    command_line,
    config_file,
    skip_where_trl_cannot,
    trained,
)
from tests.support.data import (
    BLOCKS_OF_64,
    better_and_worse,
    labelled,
    preferences,
    prompts,
    save_base,
    texts,
    write_rows,
)
from tests.support.jobs import reward_model
from tests.support.left import assert_acted, state_of
from tests.support.tiny import assert_same, tokenizer

SHORT = {"max_completion_length": 6, "num_generations": 4}
WORDS = {"reward_funcs": ["tests.support.data.distinct_words"]}
RUNS = {
    # command: its trainer, rows of the data, arguments beside those of every tiny run
    "sft": ("SFTTrainer", texts, {"max_length": 32}),
    "dpo": ("DPOTrainer", preferences, {"max_length": 32}),
    "kto": ("KTOTrainer", labelled, {"max_length": 32}),
    "reward": ("RewardTrainer", better_and_worse, {"max_length": 32}),
    "grpo": ("GRPOTrainer", prompts, {**SHORT, **WORDS}),
    "rloo": ("RLOOTrainer", prompts, {**SHORT, **WORDS, "reward_model_name_or_path": "judge"}),
}


@pytest.mark.parametrize("command", RUNS)
def test_what_init_prints_trains(command, place, monkeypatch, capsys):
    """Three steps of each command: the printed file, with a local model and data in it, on the CPU."""
    skip_where_trl_cannot(command)
    assert main(["init", command]) == 0
    printed = capsys.readouterr().out
    trainer_name, rows, more = RUNS[command]
    write_rows(place / "data.jsonl", rows())
    reward_model().save_pretrained("judge")
    tokenizer().save_pretrained("judge")
    (place / "run.yaml").write_text(printed, encoding="utf-8")
    here = {**SETTINGS, "dataset_name": "data.jsonl", **more}
    trainer = trained(monkeypatch, command, "--config", "run.yaml", *command_line(here))
    assert type(trainer).__name__ == trainer_name
    options, _ = assert_acted("out")
    assert options == StructLoRAConfig().options()
    assert trainer.model.peft_config["default"].r == yaml.safe_load(printed)["lora_r"]
    assert {"save_steps", "save_strategy"} & yaml.safe_load(printed).keys()
    is_online = command in ("grpo", "rloo")  # which log rewards in place of a held-out loss
    logged = "reward" if is_online else "eval_loss"
    assert any(logged in entry for entry in trainer.state.log_history)
    if command != "reward":
        assert_plain_peft_agrees(trainer.model, "out")


def test_init_says_how_long_the_run_will_take(place, capsys):
    """It trains as the file says, on this machine, and leaves the file alone."""
    assert main(["init", "--data", "data.jsonl", "--model", "base", "--time"]) == 0
    printed = capsys.readouterr().out
    assert re.match(r"# [\d.e-]+ s a step here: about \d+ (s|minutes|hours) for 15 steps", printed)
    given = yaml.safe_load(printed)
    assert given.get("use_cpu", False) is not torch.accelerator.is_available()
    assert {path.name for path in place.iterdir()} <= {"base", "cache", "data.jsonl"}


def test_any_other_script_of_trl(place, monkeypatch):
    """A command that this package does not know by name."""
    pytest.importorskip("trl.scripts.distillation")
    write_rows(place / "data.jsonl", prompts())
    save_base(place / "teacher", num_hidden_layers=2)  # from the base itself there would be nothing to learn
    here = {
        **SETTINGS,
        "dataset_name": "data.jsonl",
        "teacher_model_name_or_path": "teacher",
        "max_completion_length": 6,
    }
    trained(monkeypatch, "distillation", *command_line(here), "--lora_target_modules", "q_proj")
    assert state_of("out")[0]["step"] == 3


def test_structlora_false_is_plain_lora(place, monkeypatch, capsys):
    off = ["--structlora.gates", "off", "--structlora.coordinator", "none"]
    trained(monkeypatch, "sft", "--config", config_file(seed=3, output_dir="off"), *off)
    block = config_file(seed=3, output_dir="plain", structlora={"beta": 0.6})
    trained(monkeypatch, "sft", "--config", block, "--structlora", "false")
    assert "plain LoRA" in capsys.readouterr().out
    assert not Path("plain", STATE_NAME).exists()
    assert_same(*(load_file(f"{folder}/adapter_model.safetensors") for folder in ("plain", "off")))
    for folder in ("plain", "off"):  # what the report page says of both, in a log whose first rate is lower
        facts = command_facts(Path(folder))
        assert facts["data"] == ["data.jsonl"] and facts["learning_rate"] == 1e-2


def test_plain_lora_leaves_nothing_of_the_run_before(place, monkeypatch, capsys):
    """Both halves of a comparison in one folder, whose name a shell would split."""
    given, card = config_file(output_dir="my out"), Path("my out", "README.md")
    trained(monkeypatch, "sft", "--config", given)
    assert HEADING in card.read_text() and TAG in ModelCard.load(card).data.tags
    assert "structlora inspect 'my out'" in capsys.readouterr().out
    card.write_text(card.read_text() + "\n## My notes\n\nKeep this.\n")
    trained(monkeypatch, "sft", "--config", given, "--structlora", "false", "--overwrite")
    assert HEADING not in card.read_text() and TAG not in ModelCard.load(card).data.tags
    assert card.read_text().count("## My notes\n\nKeep this.") == 1
    assert not Path("my out", STATE_NAME).exists()
    assert main(["inspect", "my out"]) == 0


SWITCHES = {
    "structlora": [],
    "lora": ["--structlora", "false"],
    "selection": ["--structlora.keep", "0.25", "--structlora.select_at", "10"],
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_run_says_what_it_is_and_what_may_come_next(name, place, monkeypatch, capsys):
    """Before the first step: rows, batch, steps, epochs, parameters. After the last: losses, size, commands that run."""
    held_out = {"test_split_size": 0.25, "eval_strategy": "steps", "eval_steps": 1}
    given = config_file(**held_out, gradient_accumulation_steps=2, max_steps=12)
    more = ["--seed", "7", "--output_dir", "my-out", *SWITCHES[name]]
    trainer = trained(monkeypatch, "sft", "--config", given, *more)
    said = capsys.readouterr().out
    assert said.count("18 rows, 6 held out, batch of 8, 12 steps, 4 epochs") == 1
    trains, of = trainer.model.get_nb_trainable_parameters()
    assert said.count(f"trains {trains:,} of {of:,} parameters") == 1
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert said.count(f"held-out loss {losses[-1]:.4g}") == 1
    assert said.count(f"the adapter: {trains:,} parameters") == 1
    assert said.count("`structlora inspect my-out`") == 1
    directions = sum(len(p) for n, p in trainer.model.named_parameters() if "lora_A" in n)
    kept = f"{directions // 4} of {directions} directions kept (`structlora export ADAPTER SMALL --prune`"
    assert said.count(kept) == said.count("directions kept") == (name == "selection")
    assert main(["inspect", "my-out"]) == 0


def test_8_bit(place, monkeypatch):
    """4 bits are in a configuration of `configs/trl`."""
    pytest.importorskip("bitsandbytes")
    save_base(place / "base", **BLOCKS_OF_64)
    trainer = trained(monkeypatch, "sft", "--config", config_file(), "--load_in_8bit")
    layer = trainer.model.get_base_model().model.layers[0].self_attn.q_proj
    assert type(layer.base_layer).__name__.startswith("Linear8bit")
    assert_acted("out")
    assert_plain_peft_agrees(trainer.model, "out")


@pytest.mark.parametrize("more", [[], ["--restore_callback_states_from_checkpoint", "true"]])
def test_resume_goes_on_where_the_run_ended(more, place, monkeypatch, capsys):
    steps = {"save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 12}
    given = config_file(save_strategy="steps", lr_scheduler_type="constant", **steps)
    trained(monkeypatch, "sft", "--config", given, "--output_dir", "whole")
    trained(monkeypatch, "sft", "--config", given, "--max_steps", "2")
    monkeypatch.setenv("HOME", str(Path.cwd()))
    trained(
        monkeypatch,
        "sft",
        "--config",
        given,
        "--resume_from_checkpoint",
        "true",
        "--output_dir",
        "~/out",
        *more,
    )
    assert "checkpoint-2" in capsys.readouterr().out
    assert_same(*(load_file(f"{folder}/{STATE_NAME}") for folder in ("whole", "out")))
    assert state_of("out")[0]["step"] == 4


@pytest.mark.parametrize("save_steps, words", [(1, "false --resume_from_checkpoint true"), (9, "save_steps")])
def test_interrupted(save_steps, words, place, monkeypatch, capsys):
    """Ctrl-C in the third step: two lines that say how to go on, and the exit code of SIGINT."""
    step = Trainer.training_step

    def interrupted(self, *args, **more):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *args, **more)

    monkeypatch.setattr(Trainer, "training_step", interrupted)
    given = config_file("my run.yaml", save_strategy="steps", save_steps=save_steps)
    assert main(["sft", "--config", given, "--resume_from_checkpoint", "false"]) == 130
    last = capsys.readouterr().err.strip().splitlines()[-2:]
    assert words in " ".join(last) and "structlora sft --config 'my run.yaml'" in last[1]
    assert ("checkpoint-2" in last[0]) == (save_steps == 1)


def test_overwrite_leaves_no_checkpoint_of_the_run_before(place, monkeypatch):
    """It would pass for one of this run, and be the one to continue from."""
    given = config_file(save_strategy="steps", save_steps=2, max_steps=4)
    trained(monkeypatch, "sft", "--config", given)
    trained(monkeypatch, "sft", "--config", given, "--overwrite", "--max_steps", "3")
    trained(monkeypatch, "sft", "--config", given, "--overwrite", "--resume_from_checkpoint", "true")
    assert {path.name for path in Path("out").glob("checkpoint-*")} == {
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-4",
    }


def test_an_error_in_training_keeps_its_traceback(place, monkeypatch):
    """It may be of anybody's code, so that it is not put down to what the user gave."""

    def broken(self, *args, **more):
        raise ValueError("of the loss")

    monkeypatch.setattr(Trainer, "training_step", broken)
    with pytest.raises(ValueError, match="of the loss"):
        main(["sft", "--config", config_file()])


def test_the_best_checkpoint_is_what_is_saved(place, monkeypatch, capsys):
    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    # The loss is to be as high as can be, and falls: the first checkpoint is the best.
    worst = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    more = {"greater_is_better": True, "test_split_size": 0.25, "learning_rate": 0.01, "max_steps": 4}
    trainer = trained(monkeypatch, "sft", "--config", config_file(**every, **worst, **more))
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    first, *_, last = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    said = f"held-out loss {first:.4g} of the best checkpoint, step 1 (last: {last:.4g})"
    assert said in capsys.readouterr().out
    assert_same(*(load_file(folder / STATE_NAME) for folder in (Path("out"), best)))
    assert_plain_peft_agrees(trainer.model, "out")
    assert main(["inspect", "out"]) == 0  # adapter and state belong together
