"""The callback alone, under every trainer it serves: it acts, saves, resumes, reports, and behaves as plain LoRA does."""

from __future__ import annotations

import contextlib
import gc
import inspect
import math
import re
import signal
import subprocess
import sys
import textwrap
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from structlora_trl import (
    StructLoRACallback,
    StructLoRAConfig,
    StructLoRAError,
    StructLoRAMixin,
    StructLoRASFTConfig,
    StructLoRASFTTrainer,
    attach,
    tensor_file,
)
from structlora_trl.trainers.console import end_lines
from tests.support.jobs import StopAt, arguments, checkpoints, plain, sft
from tests.support.launching import ROOT
from tests.support.left import state_of
from tests.support.tiny import (
    DATA,
    FAMILIES,
    assert_same,
    base_model,
    differing,
    lora_parameters,
    loss_of,
    peft_model,
    weights_of,
)

STATE = "structlora.safetensors"
EVERY_OTHER_STEP = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
}


SAVES = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


class SavesItself(SFTTrainer):
    """Writes its own checkpoints, and asks no callback for its state."""

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self.save_model(str(folder))
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / "trainer_state.json"))


@pytest.mark.parametrize(
    "kind", ["a loop of another name", "callbacks are restored", "the trainer writes its own checkpoints"]
)
def test_a_run_goes_on_whatever_the_trainer(kind, tmp_path, monkeypatch):
    options = dict(SAVES)
    if "loop" in kind:  # Unsloth puts one in the place of Trainer's, made from its source under another name
        source = textwrap.dedent(inspect.getsource(Trainer._inner_training_loop))
        namespace = {**vars(transformers.trainer)}
        exec(source.replace("def _inner_training_loop", "def _fast_inner_training_loop"), namespace)
        monkeypatch.setattr(Trainer, "_inner_training_loop", namespace["_fast_inner_training_loop"])
    elif "callbacks" in kind:  # built anew from a checkpoint; ours has a file of its own
        options["restore_callback_states_from_checkpoint"] = True
    else:
        options["trainer_class"] = SavesItself
    sft(tmp_path, [StructLoRACallback(beta=0.3), StopAt(2)], **options).train()
    given = StructLoRACallback(beta=0.3)
    trainer = sft(tmp_path, [given], **options)
    trainer.train(resume_from_checkpoint=True)
    assert [c for c in trainer.callback_handler.callbacks if isinstance(c, StructLoRACallback)] == [given]
    assert given.runtime.step == 4 and given.runtime.config.beta == 0.3
    assert state_of(tmp_path / "checkpoint-4")[0]["step"] == 4


def test_evaluation_saving_and_limit_behave_as_plain_lora(tmp_path):
    options = {**EVERY_OTHER_STEP, "save_total_limit": 2, "eval_on_start": True}
    trainer = sft(tmp_path, [StructLoRACallback()], **options)
    trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    evaluations = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert set(evaluations) == {0, 2, 4, 6}
    # What was measured is what was saved.
    saved = sft(
        tmp_path,
        [],
        model=PeftModel.from_pretrained(base_model("llama"), tmp_path / "checkpoint-4"),
        peft=False,
    )
    assert saved.evaluate()["eval_loss"] == pytest.approx(evaluations[4], abs=1e-6)


KEEP = {"keep": 0.25, "select_at": 10}
# How the first `train()` ends -> options of the method, and what training does in its twelfth step
FIRST_RUNS = {
    "done": ({}, None),
    "done, and selected": (KEEP, None),
    "interrupted before the selection": ({"keep": 0.25, "select_at": 13}, KeyboardInterrupt()),
    "interrupted after the selection": (KEEP, KeyboardInterrupt()),
    "too large a batch": ({"keep": 0.25, "select_at": 13}, RuntimeError("CUDA out of memory.")),
}


def open_share(model) -> float:
    """The share of directions whose column of lora_B is not zero."""
    open_ = [(p != 0).any(0) for n, p in lora_parameters(model).items() if "lora_B" in n]
    return float(torch.cat(open_).float().mean())


@pytest.mark.parametrize("ending", FIRST_RUNS)
def test_another_train_goes_on_with_a_clock_of_its_own(ending, tmp_path):
    options, error = FIRST_RUNS[ending]
    ends, starts = [], []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0 and ends:
                starts.append(callback.runtime.state_dict())

        def on_step_end(self, args, state, control, **kwargs):
            assert callback.runtime.step == state.global_step

        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 11 and error is not None and not ends:
                ends.append(callback.runtime.state_dict())
                raise error

    callback = StructLoRACallback(options, coordinator_lr=0.3)
    settings = {"max_steps": 14, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    settings |= {"auto_find_batch_size": isinstance(error, RuntimeError)}
    trainer = sft(tmp_path, [callback, Look()], **settings)
    is_ctrl_c = isinstance(error, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt) if is_ctrl_c else contextlib.nullcontext():
        trainer.train()  # a batch too large is made smaller, and training begins again by itself
    if error is None:
        ends.append(callback._finished)
    if not isinstance(error, RuntimeError):
        trainer.train()
    assert callback.runtime.step == 14
    assert_same(*({n: x for n, x in found[0].items() if n != "header"} for found in (ends, starts)))
    if options:
        assert open_share(trainer.model) == 0.25


def test_a_train_with_other_options_starts_from_the_weights(tmp_path, caplog):
    callback = StructLoRACallback(gates="off")
    trainer = sft(tmp_path, [callback], max_steps=3)
    trainer.train()
    callback.config = StructLoRAConfig(gates="off", coordinator="gat")
    trainer.train()
    assert "starts anew from the weights that stand" in caplog.text
    assert callback.runtime.config == callback.config and callback.runtime.step == 3


# Length of a run that goes on from checkpoint-9 of one of 40 steps -> its options, and the error
RESUMED = {60: ({}, None), 16: ({}, None), 12: ({"select_at": 12}, "step 12 of a run of 12 steps")}


@pytest.mark.parametrize("steps", RESUMED)
def test_a_resumed_run_of_another_length_selects(steps, tmp_path):
    """Also one that is past its step."""
    more, error = RESUMED[steps]
    options = {"save_strategy": "steps", "save_steps": 9}
    sft(tmp_path, [StructLoRACallback(keep=0.25), StopAt(9)], max_steps=40, **options).train()
    callback = StructLoRACallback(keep=0.25, **more)
    trainer = sft(tmp_path, [callback], max_steps=steps, **options)
    with pytest.raises(StructLoRAError, match=error) if error else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=True)
    assert error or callback.runtime.has_selected


class Scripted(TrainerCallback):
    """Says at which steps evaluations are good: the best step, and worse the further from it."""

    def __init__(self, best: int):
        self.best = best

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_score"] = -abs(state.global_step - self.best)


BEST = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": True,
    "max_steps": 14,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
}


def assert_stands(trainer, step: int) -> None:
    """The model is the adapter of a checkpoint."""
    best = load_file(Path(trainer.args.output_dir) / f"checkpoint-{step}" / "adapter_model.safetensors")
    assert_same(renamed(best), weights_of(trainer.model))


def test_best_model_is_loaded_and_training_goes_on_from_it(tmp_path):
    callback = StructLoRACallback()
    trainer = sft(tmp_path, [callback, Scripted(best=2)], **{**BEST, "max_steps": 6})
    trainer.train()
    assert_stands(trainer, 2)
    assert callback.runtime.step == 2
    trainer.train()
    assert state_of(tmp_path / "checkpoint-6")[0]["step"] == 6


def test_the_best_model_is_one_with_its_directions_selected(tmp_path):
    """The very best evaluation is of before the selection."""
    callback = StructLoRACallback(KEEP)
    trainer = sft(tmp_path, [callback, Scripted(best=4)], **BEST)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-10") and callback.runtime.has_selected
    assert open_share(trainer.model) == 0.25


@pytest.mark.parametrize("is_on", [False, True])
def test_the_end_names_what_would_have_kept_a_lower_loss(is_on, tmp_path):
    trainer = sft(
        tmp_path, [StructLoRACallback()], **{**BEST, "max_steps": 4, "load_best_model_at_end": is_on}
    )
    trainer.add_callback(Scripted(best=4))
    trainer.train()
    first, last = (entry for entry in trainer.state.log_history if "eval_loss" in entry)
    first["eval_loss"] = last["eval_loss"] / 2
    said = end_lines("a run", trainer, trainer.model)
    assert f"(lowest: {first['eval_loss']:.4g} after step 2" in said
    assert ("which `load_best_model_at_end` keeps" in said) != is_on


def test_a_best_model_of_a_run_that_ended_before_the_selection_is_refused(tmp_path):
    trainer = sft(tmp_path, [StructLoRACallback(KEEP), Scripted(best=2), StopAt(6)], **BEST)
    with pytest.raises(StructLoRAError, match="ended at step 6, before directions are selected at step 10"):
        trainer.train()
    best = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert_same(renamed(best), weights_of(trainer.model))


def test_a_checkpoint_is_uploaded_with_its_state(tmp_path, monkeypatch):
    whole = []

    def push(trainer, folder):
        trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
        whole.append((Path(folder) / STATE).is_file())

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda trainer: None)
    trainer = sft(tmp_path, [StructLoRACallback()], **SAVES)
    trainer.args.push_to_hub = True
    trainer.train()
    assert whole == [True, True]


class CtrlC(TrainerCallback):
    """Interrupts the fourth step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


@pytest.mark.parametrize("then", ["plain LoRA", "another callback"])
def test_an_interrupted_trainer_goes_on_without_its_callback(then, tmp_path):
    """It keeps its optimizer."""
    first, breaks = StructLoRACallback(), CtrlC()
    trainer = sft(tmp_path, [first, breaks], max_steps=6)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(first)
    trainer.remove_callback(breaks)
    if then == "plain LoRA":
        trainer.train()
        losses = [loss_of(trainer.model.train(), "llama", 0) for _ in range(2)]
        assert torch.equal(*losses)
    else:
        second = StructLoRACallback(gates="off")
        trainer.add_callback(second)
        trainer.train()
        assert second.runtime.step == 6
    assert first.runtime.step == 4


@pytest.mark.parametrize("options", [{}, {"gates": "off", "coordinator": "none"}])
def test_a_diverged_run_finishes_as_plain_lora_does(options, tmp_path):
    trainer = sft(
        tmp_path,
        [StructLoRACallback(options)],
        learning_rate=1e30,
        optim="sgd",
        max_grad_norm=0.0,
        logging_nan_inf_filter=False,
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert any(math.isnan(entry.get("structlora/effective_rank", 0)) for entry in trainer.state.log_history)
    assert not any(
        math.isnan(entry.get("structlora/stream_cosine", 0)) for entry in trainer.state.log_history
    )


OPTIONS = {"beta": 0.5, "coordinator": "none"}
MORE = {**OPTIONS, "gate_lr": 0.1}
IN_BOTH = "beta=0.5, coordinator='none' in .* beta=1.0, coordinator='gcn'"
# Where options come from -> the trainer, its arguments, callbacks, and the options that act, or words of an error
OPTIONS_FROM = {
    "our arguments": (StructLoRASFTTrainer, OPTIONS, [], OPTIONS),
    "nowhere": (StructLoRASFTTrainer, None, [], {}),
    "our trainer": (partial(StructLoRASFTTrainer, structlora_config=OPTIONS), None, [], OPTIONS),
    "our arguments, and a callback without any": (SFTTrainer, OPTIONS, [{}], OPTIONS),
    "the same in both, and more": (SFTTrainer, OPTIONS, [MORE], MORE),
    "others in both": (SFTTrainer, OPTIONS, [{"gate_lr": 0.1}], IN_BOTH),
    "some of them in both": (
        SFTTrainer,
        OPTIONS,
        [StructLoRAConfig(coordinator="none")],
        "found beta=0.5 in",
    ),
}


@pytest.mark.parametrize("place", OPTIONS_FROM)
def test_where_options_come_from(place, tmp_path):
    trainer_class, given, callbacks, expected = OPTIONS_FROM[place]
    config_class, arguments = (
        (SFTConfig, {}) if given is None else (StructLoRASFTConfig, {"structlora": given})
    )
    trainer = sft(tmp_path, [*map(StructLoRACallback, callbacks)], trainer_class, config_class, **arguments)
    if isinstance(expected, str):
        with pytest.raises(StructLoRAError, match=expected):
            trainer.train()
        return
    trainer.train()
    (ours,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, StructLoRACallback)]
    assert ours.config == ours.runtime.config == StructLoRAConfig(**expected)
    assert ours.runtime.step == 3


def test_options_are_read_from_any_arguments(tmp_path):
    """Arguments of other libraries, or of one's own, need a `structlora` alone."""
    callback = StructLoRACallback()
    trainer = plain(tmp_path, [callback])
    trainer.args.structlora = '{"beta": 0.8}'
    trainer.train()
    assert callback.runtime.config == StructLoRAConfig(beta=0.8)


@pytest.mark.parametrize("switch", [True, False])
def test_the_arguments_can_switch_it_off(switch, tmp_path):
    trainer = sft(tmp_path, None, StructLoRASFTTrainer, StructLoRASFTConfig, structlora=switch)
    trainer.train()
    assert any("structlora/effective_rank" in entry for entry in trainer.state.log_history) is switch
    if not switch:
        with pytest.raises(StructLoRAError, match="structlora=False"):
            sft(tmp_path, [StructLoRACallback()], config_class=StructLoRASFTConfig, structlora=False).train()


def test_a_mixin_behind_the_trainer_is_refused():
    """Its constructor would never run."""

    class Middle(StructLoRAMixin):
        pass

    for bases in ((SFTTrainer, StructLoRAMixin), (SFTTrainer, Middle), (Trainer, Middle)):
        with pytest.raises(StructLoRAError, match="class Wrong.*, .*Trainer"):
            type("Wrong", bases, {})
    assert issubclass(type("Right", (Middle, SFTTrainer), {}), SFTTrainer)


METRICS = {"structlora/" + name for name in ("gate_openness", "nats", "closed_share", "effective_rank")}
METRICS |= {"structlora/" + name for name in ("drift_energy", "gradient_cosine", "stream_cosine")}
METRICS |= {"structlora/" + name for name in ("semantic_edges", "theta_norm", "skipped_steps")}


@pytest.mark.parametrize("progress_bar", [False, True])
def test_metrics_reach_trackers_and_the_history_and_three_the_console(
    progress_bar, tmp_path, monkeypatch, capsys
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    trainer = sft(tmp_path, [StructLoRACallback()], report_to="tensorboard", disable_tqdm=not progress_bar)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if "{'loss'" in line]
    found = [set(re.findall(r"structlora/(\w+)", line)) for line in lines]
    assert found == [{"gate_openness", "nats", "closed_share"}] * 3
    (events,) = [p.parent for p in tmp_path.rglob("events.out.tfevents*")]
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    tags = [tag for tag in accumulator.Tags()["scalars"] if "structlora" in tag]
    counts = {tag.removeprefix("train/"): len(accumulator.Scalars(tag)) for tag in tags}
    assert counts.keys() == METRICS
    assert counts.pop("structlora/gradient_cosine") == 2  # the first step has none
    assert set(counts.values()) == {3}
    *_, last, end = trainer.state.log_history
    assert METRICS == {name for name in last if "structlora" in name}
    assert 1 <= last["structlora/effective_rank"] <= 4 and 0 <= last["structlora/stream_cosine"] <= 1 + 1e-5
    assert "train_runtime" in end and "structlora" not in str(end)


KILLED = """
import os, signal
from structlora_trl import tensor_file
from tests.support.jobs import sft
from structlora_trl import StructLoRACallback

write = tensor_file.save_file
def killed_at_4(tensors, path, metadata):
    write(tensors, path, metadata)
    if "checkpoint-4" in str(path):
        with open(path, "rb+") as file:
            file.truncate(os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
tensor_file.save_file = killed_at_4
sft({output!r}, [StructLoRACallback()], max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=2).train()
"""


def test_killed_during_a_save_the_checkpoint_before_still_resumes(tmp_path):
    """Trainer deletes older checkpoints before `on_save`, so with room for two, one is whole at any moment."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(output=str(tmp_path))], capture_output=True, cwd=ROOT
    )
    assert done.returncode == -signal.SIGKILL
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(StructLoRAError, match=f"no {STATE} in .*checkpoint-4.*resume from .*checkpoint-2"):
        sft(tmp_path, [StructLoRACallback()], **options).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )
    callback = StructLoRACallback()
    moved = (tmp_path / "checkpoint-2").rename(tmp_path / "moved")  # a folder of any name will do
    sft(tmp_path, [callback], **options).train(resume_from_checkpoint=str(moved))
    assert callback.runtime.step == 6
    whole = tmp_path / "whole"
    sft(whole, [StructLoRACallback()], **options).train()
    assert_same(state_of(tmp_path / "checkpoint-6")[1], state_of(whole / "checkpoint-6")[1])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left")])
def test_disk_full_while_saving_keeps_the_old_checkpoint(error, tmp_path, monkeypatch):
    write = tensor_file.save_file

    def full(tensors, path, metadata):
        if "checkpoint-4" not in str(path):
            return write(tensors, path, metadata)
        Path(path).write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(tensor_file, "save_file", full)
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    with pytest.raises(StructLoRAError, match="No space left"):
        sft(tmp_path, [StructLoRACallback()], **options).train()
    assert not list((tmp_path / "checkpoint-4").glob("structlora*"))
    assert state_of(tmp_path / "checkpoint-2")[0]["step"] == 2


@pytest.mark.parametrize("named", [True, False])
def test_trials_of_a_search_have_states_of_their_own(named, tmp_path):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    template = plain(tmp_path, [])
    trainer = Trainer(
        model_init=lambda: plain(tmp_path, []).model,
        args=replace(template.args, save_strategy="steps", save_steps=3),
        train_dataset=template.train_dataset,
        eval_dataset=template.eval_dataset,
        callbacks=[StructLoRACallback()],
    )
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)},
        n_trials=2,
        backend="optuna",
        hp_name=(lambda trial: f"trial_{trial.number}") if named else None,
    )
    headers, states = zip(
        *(state_of(folder) for folder in sorted(tmp_path.glob("*/checkpoint-3"))), strict=True
    )
    assert [header["step"] for header in headers] == [3, 3]
    thetas = [name for name in states[0] if name.endswith(".theta")]
    assert thetas and not any(torch.equal(states[0][name], states[1][name]) for name in thetas)


class Snapshot(TrainerCallback):
    """Copies the adapter when training begins, as moving averages do."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.taken = weights_of(model)


@pytest.mark.parametrize("is_added_later", [False, True])
def test_snapshots_at_the_start_are_of_what_trains(is_added_later, tmp_path, caplog):
    """Attaching gives all depths one lora_A: it comes first, wherever the callback is listed; where it cannot, it is told."""
    taken = Snapshot()
    trainer = sft(tmp_path, [taken] if is_added_later else [taken, StructLoRACallback()])
    if is_added_later:
        trainer.add_callback(StructLoRACallback())
    trainer.train()
    first, *others = (value for name, value in taken.taken.items() if "q_proj.lora_A" in name)
    assert ("Snapshot ran before StructLoRA" in caplog.text) == is_added_later
    assert all(torch.equal(first, other) for other in others) != is_added_later


LOADS_WITHOUT = """
import sys
sys.modules["structlora_trl"] = None
import torch
from peft import PeftModel
model = torch.load(sys.argv[1], weights_only=False)
model.save_pretrained(sys.argv[2])
PeftModel.from_pretrained(model.unload(), sys.argv[2])
"""


def test_a_pickled_model_needs_no_package_of_ours(tmp_path):
    trainer = plain(tmp_path, [StructLoRACallback()])
    trainer.train()
    torch.save(trainer.model, tmp_path / "model.pt")
    command = [sys.executable, "-c", LOADS_WITHOUT, str(tmp_path / "model.pt"), str(tmp_path / "saved")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = trainer.model.state_dict(), load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert theirs and all(torch.equal(ours[f"{name}"], value) for name, value in renamed(theirs).items())


def renamed(saved: dict) -> dict:
    """Weights of a saved adapter by their names in the model."""
    names = {name: re.sub(r"(lora_[AB])", r"\1.default", name) for name in saved if "lora_" in name}
    return {names[name]: saved[name] for name in names}


def test_the_callback_does_not_keep_the_model(tmp_path):
    callback = StructLoRACallback()
    trainer = plain(tmp_path, [callback])
    trainer.train()
    model = weakref.ref(trainer.model)
    del trainer
    gc.collect()
    assert model() is None
    assert callback.runtime.step == 3 and callback.runtime.openness()


class Encoders(torch.nn.Module):
    """A model that holds PEFT models: a bi-encoder, or one tower with a head."""

    def __init__(self, **towers):
        super().__init__()
        self.towers = torch.nn.ModuleDict(towers)

    def forward(self, input_ids, labels):
        loss = sum(tower(input_ids=input_ids, labels=labels).loss for tower in self.towers.values())
        return {"loss": loss, "logits": input_ids}


def encoders(output, callback, *names):
    rows = [{name: values[0] for name, values in FAMILIES["llama"].batch(i).items()} for i in range(48)]
    model = Encoders(**{name: peft_model() for name in names})
    return Trainer(model, TrainingArguments(**arguments(output)), train_dataset=rows, callbacks=[callback])


@pytest.mark.parametrize("towers, option", [(["query"], None), (["query", "document"], "towers.document")])
def test_a_peft_model_inside_the_model(towers, option, tmp_path, capsys):
    callback = StructLoRACallback(peft_module=option)
    trainer = encoders(tmp_path, callback, *towers)
    untouched = weights_of(trainer.model)
    trainer.train()
    name = option or "towers.query"
    assert f"`{name}`" in capsys.readouterr().out and callback.runtime.step == 3
    ours = {id(p) for p in callback.runtime.lora_parameters()}
    assert ours == {id(p) for n, p in lora_parameters(trainer.model).items() if n.startswith(name)}
    moved = differing(weights_of(trainer.model), untouched)
    # The others train as plain LoRA.
    assert all(any(n.startswith(f"towers.{tower}") for n in moved) for tower in towers)


@pytest.mark.parametrize(
    "towers, option, named",
    [
        (["query", "document"], None, "peft_module='towers.query'"),
        (["query", "document"], "towers.text", "'towers.query', 'towers.document'"),
        ([], None, "Encoders"),
    ],
)
def test_a_peft_model_that_is_not_named(towers, option, named, tmp_path):
    model = Encoders(**{name: peft_model() for name in towers})
    optimizer = torch.optim.SGD([*model.parameters(), torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(StructLoRAError, match=named):
        attach(model, optimizer, peft_module=option, **DATA)


def thetas_of(callback) -> torch.Tensor:
    thetas = [p.detach().flatten() for m in callback.runtime.maps for p in m.coordinators.parameters()]
    return torch.cat(thetas)


def test_a_fresh_adapter_within_a_run_keeps_the_schedule(tmp_path):
    """Half way down a linear schedule, a new coordinator learns at half its rate, and not as at a peak."""

    class Restarts(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 3:
                callback.start_over(trainer, optimizer, trainer.model.base_model.model.zero_grad)

        def on_step_end(self, args, state, control, **kwargs):
            moved.append(thetas_of(callback).abs().max().item())

    moved, callback = [], StructLoRACallback()
    model = peft_model(init="warm", targets=["q_proj", "v_proj", "o_proj"])  # Θ has a gradient at once
    options = {"max_steps": 6, "lr_scheduler_type": "linear", "model": model, "peft": False}
    trainer = sft(tmp_path, [callback, Restarts()], **options)
    trainer.train()
    assert callback.runtime.step == 6
    # AdamW's first step is its rate, by default that of LoRA.
    assert moved[0] == pytest.approx(trainer.args.learning_rate, rel=0.02)
    assert moved[3] == pytest.approx(trainer.args.learning_rate / 2, rel=0.02)
