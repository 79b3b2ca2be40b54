"""The command line, on a tiny local model and data: each command does its work, and each mistake gets a message."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from structlora_trl.cli import main
from structlora_trl.cli.methods import METHODS
from structlora_trl.model_card import HEADING, TAG
from structlora_trl.state import STATE_NAME
from tests.support.cli_runs import (
    SFT,
    assert_plain_peft_agrees,
    command_line,
    config_file,
    skip_where_trl_cannot,
    trained,
)
from tests.support.data import BLOCKS_OF_64, chats, save_base, saved_pictures, texts, write_rows
from tests.support.launching import ROOT, free_port, one_at_a_time, run, torchrun
from tests.support.left import assert_acted, state_of

BIN = Path(sys.executable).parent


def test_sft_from_a_file_and_the_command_line(place, monkeypatch):
    trainer = trained(monkeypatch, "sft", "--config", config_file(gate_init=0.6), "--gate_lr", "0.05")
    options, _ = state_of("out")
    assert options["gate_init"] == 0.6 and options["gate_lr"] == 0.05 and trainer.args.learning_rate == 1e-2
    assert_acted("out")
    assert_plain_peft_agrees(trainer, "out")
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    assert "structlora/gate_openness" in history[0]


def test_a_block_of_options_as_in_the_other_doors(place, monkeypatch):
    """What stands under `structlora:` is StructLoRA's, `seed` too; the command line wins."""
    block = {"gate_init": 0.6, "coordinator": "gcn", "edges": "adjacency", "gate_lr": "5e-2", "prior": 0.4, "seed": 7}
    given = config_file(structlora=block, seed=3)
    trainer = trained(monkeypatch, "sft", "--config", given, "--prior", "0.3", "--edges", "hybrid")
    options, _ = state_of("out")
    expected = {**block, "gate_lr": 0.05, "prior": 0.3, "edges": "hybrid"}
    assert {name: options[name] for name in block} == expected and trainer.args.seed == 3
    trained(monkeypatch, "sft", "--config", given, "--structlora", "false", "--output_dir", "plain")
    assert not Path("plain", STATE_NAME).exists()


def test_structlora_false_is_plain_lora(place, monkeypatch, capsys):
    given = config_file(seed=3)
    trained(monkeypatch, "sft", "--config", given, "--structlora", "false", "--output_dir", "plain")
    assert "this run is plain LoRA" in capsys.readouterr().out
    trained(
        monkeypatch,
        "sft",
        "--config",
        given,
        "--output_dir",
        "off",
        *command_line({"filter": "none", "coordinator": "none"}),
    )
    assert not Path("plain", STATE_NAME).exists()
    plain, off = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("plain", "off"))
    assert plain.keys() == off.keys() and all(torch.equal(plain[name], off[name]) for name in plain)


def test_plain_lora_leaves_nothing_of_the_run_before(place, monkeypatch, capsys):
    """Both halves of a comparison in one folder."""
    given, card = config_file(), Path("out", "README.md")
    trained(monkeypatch, "sft", "--config", given)
    assert HEADING in card.read_text() and TAG in ModelCard.load(card).data.tags
    assert "`structlora inspect out`" in capsys.readouterr().out
    card.write_text(card.read_text() + "\n## My notes\n\nKeep this.\n")
    trained(monkeypatch, "sft", "--config", given, "--structlora", "false")
    assert HEADING not in card.read_text() and TAG not in ModelCard.load(card).data.tags
    assert card.read_text().count("## My notes\n\nKeep this.") == 1
    assert not Path("out", STATE_NAME).exists() and "inspect" not in capsys.readouterr().out
    assert main(["inspect", "out"]) == 0


def _one_file(suffix):
    def write(folder):
        rows = Dataset.from_list(texts())
        {"json": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](folder / f"rows.{suffix}")
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


DATA = {
    **{suffix: _one_file(suffix) for suffix in ("json", "csv", "parquet")},
    "folder": _folder,
    "mixture": _mixture,
    "array": _array,
}


@pytest.mark.parametrize("kind", DATA)
def test_local_data(kind, place, monkeypatch):
    options = DATA[kind](place)
    trainer = trained(monkeypatch, "sft", "--config", config_file(**options))
    assert (trainer.eval_dataset is not None) == ("eval_strategy" in options)
    if "eval_strategy" in options:
        assert any("eval_loss" in entry for entry in trainer.state.log_history)
    assert_acted("out")
    assert_plain_peft_agrees(trainer, "out")


def test_llava_with_pictures(place, monkeypatch):
    save_base(place / "llava", "llava")
    write_rows(place / "pictures.jsonl", saved_pictures(place))
    options = {"model_name_or_path": "llava", "dataset_name": "pictures.jsonl", "max_length": None}
    trainer = trained(monkeypatch, "sft", "--config", config_file(**options, lora_target_modules=["q_proj", "v_proj"]))
    assert trainer.callback_handler.callbacks[0].runtime.metrics()
    _, state = state_of("out")
    assert any("vision_tower" in name for name in state)
    assert_acted("out")
    assert_plain_peft_agrees(trainer, "out", "llava")


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised(bits, place, monkeypatch):
    pytest.importorskip("bitsandbytes")
    save_base(place / "base", **BLOCKS_OF_64)
    trainer = trained(monkeypatch, "sft", "--config", config_file(), f"--load_in_{bits}bit")
    layer = trainer.model.get_base_model().model.layers[0].self_attn.q_proj
    assert type(layer.base_layer).__name__.startswith(f"Linear{bits}bit")
    assert_acted("out")
    assert_plain_peft_agrees(trainer, "out")


@pytest.mark.parametrize("more", [[], ["--restore_callback_states_from_checkpoint", "true"]])
def test_resume_goes_on_where_the_run_ended(more, place, monkeypatch):
    given = config_file(save_strategy="steps", save_steps=2, max_steps=4, lr_scheduler_type="constant")
    trained(monkeypatch, "sft", "--config", given, "--output_dir", "whole")
    trained(monkeypatch, "sft", "--config", given, "--max_steps", "2")
    trained(monkeypatch, "sft", "--config", given, "--resume_from_checkpoint", "true", *more)
    whole, parts = (load_file(f"{folder}/{STATE_NAME}") for folder in ("whole", "out"))
    assert whole["step"] == 4 and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_best_checkpoint_is_what_is_saved(place, monkeypatch, capsys):
    every = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "test_split_size": 0.25,
    }
    # Accuracy is to be as low as can be, and rises: the first checkpoint is the best.
    worst = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_mean_token_accuracy",
        "greater_is_better": False,
    }
    trainer = trained(monkeypatch, "sft", "--config", config_file(**every, **worst, learning_rate=0.1, max_steps=4))
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    ours, theirs = (load_file(folder / STATE_NAME) for folder in (Path("out"), best))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert_plain_peft_agrees(trainer, "out")
    assert main(["inspect", "out"]) == 0  # adapter and state belong together


def test_the_mixture_wins_over_the_name_as_in_trl(place, monkeypatch, caplog):
    trainer = trained(
        monkeypatch, "sft", "--config", config_file(**{**_mixture(place), "dataset_name": "absent.jsonl"})
    )
    assert "`dataset_name` is ignored" in caplog.text and len(trainer.train_dataset) == 36


MISTAKES = [
    # arguments, exit code, words of the message
    (["stf"], 2, "did you mean 'sft'"),
    (["sft", "--gate_ini", "0.3"], 2, "did you mean --gate_init?"),
    (["sft", "--config", "run.yaml", "--output_dir", "out", "stray"], 2, "unexpected 'stray'"),
    (["sft", "--edges", "none"], 2, "invalid choice"),
    (["sft", "--config", "missing.yaml"], 1, "no file missing.yaml"),
    (["sft", "--config", "broken.yaml"], 1, "broken.yaml unreadable"),
    (["sft", "--config", "empty.yaml"], 1, "without keys"),
    (["sft", "--config", "misspelt.yaml"], 1, "did you mean `learning_rate`?"),
    (["sft", "--config", "run.yaml", "--gate_init", "3"], 1, "gate_init=3.0"),
    (["sft", "--config", "run.yaml", "--use_peft", "false"], 1, "remove `use_peft`"),
    (["sft", "--config", "run.yaml", "--load_in_4bit", "--load_in_8bit"], 1, "4 bit"),
    (["sft", "--config", "run.yaml", "--dataset_name", "missing.jsonl"], 1, "no file or folder missing.jsonl"),
    (["sft", "--config", "run.yaml", "--dataset_name", "broken.json"], 1, "loading the data failed"),
    (["sft", "--config", "run.yaml", "--eval_strategy", "steps"], 1, "test_split_size"),
    (["sft", "--config", "run.yaml", "--dataset_name", "other.csv"], 1, "setting up the SFTTrainer failed"),
    (["sft", "--config", "run.yaml", "--model_name_or_path", "missing"], 1, "setting up the SFTTrainer failed"),
    (["sft", "--config", "run.yaml", "--resume_from_checkpoint", "true"], 1, "no checkpoint in out"),
    (["sft", "--config", "run.yaml", "--resume_from_checkpoint", "gone"], 1, "no folder gone"),
    (["sft", "--config", "run.yaml", "--lora_target_modules", "absent"], 1, "setting up the SFTTrainer failed"),
    (["sft", "--config", "block.yaml"], 1, "write `gate_init`"),
    (["sft", "--config", "range.yaml"], 1, "gate_init=3"),
    (["sft", "--config", "twice.yaml"], 1, "keep the one under `structlora:`"),
    (["sft", "--config", "nothing.yaml"], 1, "`structlora:` with nothing under it"),
    (["sft", "--config", "run.yaml", "--accelerate_config", "zero9"], 1, "or one of fsdp1, fsdp2, multi_gpu"),
    (["sft", "--config", "run.yaml", "--num_proceses", "2"], 2, "did you mean --num_processes?"),
    (["sft", "--config", "run.yaml", "--num_processes"], 1, "--num_processes without a value"),
    (["grpo", "--config", "online.yaml"], 1, "neither `reward_funcs` nor `reward_model_name_or_path`"),
    (["grpo", "--config", "online.yaml", "--reward_funcs", "acuracy_reward"], 1, "did you mean `accuracy_reward`?"),
    (["grpo", "--config", "online.yaml", "--reward_funcs", "absent.words"], 1, "importing the reward function absent"),
    (["rloo", "--config", "online.yaml", "--reward_funcs", "math.words"], 1, "no `words` in math"),
    (["init", "stf"], 2, "invalid choice: 'stf'"),
    (["sft", "--config", "no_model.yaml"], 1, "no `model_name_or_path`"),
    (["sft", "--config", "no_data.yaml"], 1, "neither `dataset_name` nor `datasets`"),
]


@pytest.fixture
def spoilt(place):
    """The folder with files that have a mistake each, beside a whole `run.yaml`."""
    config_file()
    config_file("misspelt.yaml", learing_rate=1e-3)
    config_file("no_model.yaml", model_name_or_path=None)
    config_file("block.yaml", structlora={"gate_int": 0.8})
    config_file("range.yaml", structlora={"gate_init": 3})
    config_file("twice.yaml", structlora={"gate_init": 0.8}, gate_init=0.7)
    config_file("nothing.yaml", structlora=None)
    config_file("no_data.yaml", dataset_name=None)
    online = {**{name: value for name, value in SFT.items() if name != "max_length"}, "num_generations": 4}
    Path("online.yaml").write_text(yaml.safe_dump(online), encoding="utf-8")
    Path("broken.yaml").write_text("a: [1\nb: 2")
    Path("empty.yaml").write_text("")
    Path("broken.json").write_text("{nothing")
    Path("other.csv").write_text("a,b\n1,2\n")


@pytest.mark.parametrize("arguments, code, words", MISTAKES, ids=[words for *_, words in MISTAKES])
def test_every_mistake_gets_a_message(arguments, code, words, spoilt, capsys):
    if arguments[0] in METHODS:
        skip_where_trl_cannot(arguments[0])
    found = main(arguments)
    message = capsys.readouterr().err
    assert found == code and words in message and "Traceback" not in message, message


def test_help(capsys):
    for arguments, words in [
        (["--help"], "inspect"),
        (["sft", "--help"], "--gate_init"),
        ([], "structlora sft --config"),
    ]:
        assert main(arguments) == (0 if arguments else 2)
        assert words in capsys.readouterr().out


def script(place: Path) -> str:
    """The console script, as an installer makes it from pyproject.toml."""
    entry = re.search(r'^structlora = "(.+):(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    path = place / "structlora"
    path.write_text(f"import sys\nfrom {entry[1]} import {entry[2]}\nsys.exit({entry[2]}())\n")
    return str(path)


def started(command: list[str], engine: str) -> None:
    done = run(command)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.count(f"StructLoRA on {engine}: ") == 1
    assert_acted("out")


def test_console_script(place):
    started([sys.executable, script(place), "--local_rank=0", "sft", "--config", config_file()], "torch, 1 process")


def _accelerate(place):
    start = [str(BIN / "accelerate"), "launch", "--config_file", str(ROOT / "configs" / "accelerate" / "ddp.yaml")]
    return [*start, "--main_process_port", str(free_port()), script(place)]


def _deepspeed(place):
    pytest.importorskip("deepspeed")
    return [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), script(place)]


LAUNCHERS = {
    "torchrun": lambda place: torchrun(2, "-m", "structlora_trl.cli"),
    "accelerate": _accelerate,
    "deepspeed": _deepspeed,
}


@one_at_a_time
@pytest.mark.parametrize("name", [n if n == "torchrun" else pytest.param(n, marks=pytest.mark.slow) for n in LAUNCHERS])
def test_launchers(name, place):
    started([*LAUNCHERS[name](place), "sft", "--config", config_file()], "DDP, 2 processes")


LAUNCHES = {
    # name: (arguments of the launcher, in the file; on the command line; what runs)
    "one": ({}, ["--accelerate_config", "single_gpu"], "torch, 1 process"),
    "file": ({"accelerate_config": "multi_gpu", "num_processes": 4}, ["--num_processes=2"], "DDP, 2 processes"),
    "zero2": ({"accelerate_config": "zero2"}, ["--num_processes", "2"], "DeepSpeed ZeRO-2, 2 processes"),
    "ours": ({}, ["--accelerate_config", str(ROOT / "configs" / "accelerate" / "ddp.yaml")], "DDP, 2 processes"),
}


@one_at_a_time
@pytest.mark.parametrize("name", [n if n == "one" else pytest.param(n, marks=pytest.mark.slow) for n in LAUNCHES])
def test_accelerate_config(name, place):
    """As `trl` has it: the command starts its own processes."""
    if name == "zero2":
        pytest.importorskip("deepspeed")
    in_file, words, engine = LAUNCHES[name]
    port = ["--main_process_port", str(free_port()), "--mixed_precision", "no"]
    started([sys.executable, script(place), "sft", "--config", config_file(**in_file), *words, *port], engine)


@pytest.mark.slow
def test_a_mistake_in_started_processes_is_an_exit_code(place):
    broken = config_file(dataset_name="missing.jsonl")
    done = run([sys.executable, script(place), "sft", "--config", broken, "--accelerate_config", "single_gpu"])
    assert done.returncode == 1 and "no file or folder missing.jsonl" in done.stderr
    assert done.stderr.count("Traceback") == 0, done.stderr[-3000:]


@one_at_a_time
@pytest.mark.slow
def test_deepspeed_config(place):
    pytest.importorskip("deepspeed")
    config = config_file(deepspeed=str(ROOT / "configs" / "deepspeed" / "zero2.json"))
    started([*LAUNCHERS["torchrun"](place), "sft", "--config", config], "DeepSpeed ZeRO-2, 2 processes")


def test_the_readme_config_runs_as_pasted(place, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pasted = re.search(r"```yaml\n(model_name_or_path:.*?)```", text, re.DOTALL)[1]
    config = yaml.safe_load(pasted)
    Path("run.yaml").write_text(pasted)
    (place / "base").rename(place / "there")
    (place / config["model_name_or_path"]).parent.mkdir(parents=True)
    (place / "there").rename(place / config["model_name_or_path"])
    (place / config["dataset_name"]).mkdir(parents=True)
    write_rows(place / config["dataset_name"] / "train.jsonl", chats())
    here = command_line({"use_cpu": True, "bf16": False, "max_steps": 3})
    trainer = trained(monkeypatch, "sft", "--config", "run.yaml", *here)
    assert_acted(config["output_dir"])
    assert_plain_peft_agrees(trainer, config["output_dir"])
