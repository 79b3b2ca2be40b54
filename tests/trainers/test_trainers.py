"""The callback alone, under every trainer it serves: it acts, saves, resumes, reports, and behaves as plain LoRA does."""

from __future__ import annotations

import contextlib
import copy
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
from transformers.trainer_callback import ExportableState
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
from structlora_trl.core.gates import Gate
from structlora_trl.core.mapping import Parts
from structlora_trl.trainers.console import end_lines
from tests.support.jobs import StopAt, arguments, checkpoints, plain, sft
from tests.support.launching import ROOT
from tests.support.left import state_of
from tests.support.tiny import (
    DATA,
    FAMILIES,
    adamw,
    assert_same,
    base_model,
    differing,
    lora_parameters,
    loss_of,
    peft_model,
    train,
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


def test_training_loop_of_another_name(tmp_path, monkeypatch):
    """Unsloth puts a loop in the place of Trainer's, made from its source under another name; the Trainer is found all the same."""
    source = textwrap.dedent(inspect.getsource(Trainer._inner_training_loop))
    namespace = {**vars(transformers.trainer)}
    exec(source.replace("def _inner_training_loop", "def _fast_inner_training_loop"), namespace)
    monkeypatch.setattr(Trainer, "_inner_training_loop", namespace["_fast_inner_training_loop"])
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    sft(tmp_path, [StructLoRACallback(), StopAt(2)], **options).train()
    callback = StructLoRACallback()
    sft(tmp_path, [callback], **options).train(resume_from_checkpoint=True)
    assert callback.runtime.step == 4 and state_of(tmp_path / "checkpoint-4")[0]["step"] == 4


def test_the_callback_given_goes_on_where_trainer_restores_others(tmp_path):
    """`restore_callback_states_from_checkpoint` builds callbacks anew from a checkpoint; ours has a file of its own."""

    class Quiet(Gate):
        """Gates of one's own."""

    class Mine(StructLoRACallback):
        def __init__(self, beta):
            super().__init__(beta=beta, parts=Parts(gate=Quiet))

    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    sft(tmp_path, [Mine(0.3), StopAt(2)], **options).train()
    given = Mine(0.3)
    resumed = sft(tmp_path, [given], restore_callback_states_from_checkpoint=True, **options)
    resumed.train(resume_from_checkpoint=True)
    assert [c for c in resumed.callback_handler.callbacks if isinstance(c, StructLoRACallback)] == [given]
    assert given.runtime.step == 4 and given.runtime.plan.parts.gate is Quiet


def test_evaluation_saving_and_limit_behave_as_plain_lora(tmp_path):
    options = {
        **EVERY_OTHER_STEP,
        "save_total_limit": 2,
        "eval_on_start": True,
    }
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
    "interrupted": ({}, KeyboardInterrupt()),
    "interrupted before the selection": ({"keep": 0.25, "select_at": 13}, KeyboardInterrupt()),
    "interrupted after the selection": (KEEP, KeyboardInterrupt()),
    "too large a batch": ({"keep": 0.25, "select_at": 13}, RuntimeError("CUDA out of memory.")),
}


@pytest.mark.parametrize("ending", FIRST_RUNS)
def test_another_train_goes_on_with_a_clock_of_its_own(ending, tmp_path):
    options, error = FIRST_RUNS[ending]
    ends, starts, selected = [], [], []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0 and ends:
                starts.append(callback.runtime.state_dict())

        def on_step_end(self, args, state, control, **kwargs):
            assert callback.runtime.step == state.global_step
            selected.append(callback.runtime.has_selected)

        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 11 and error is not None and not ends:
                ends.append(callback.runtime.state_dict())
                raise error

    callback = StructLoRACallback(options, coordinator_lr=0.3)
    settings = {"max_steps": 14, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    settings |= {"auto_find_batch_size": isinstance(error, RuntimeError)}
    trainer = sft(tmp_path, [callback, Look()], **settings)
    with (
        pytest.raises(KeyboardInterrupt) if isinstance(error, KeyboardInterrupt) else contextlib.nullcontext()
    ):
        trainer.train()  # a batch too large is made smaller, and training begins again by itself
    if error is None:
        ends.append(callback._finished)
    if not isinstance(error, RuntimeError):
        trainer.train()
    assert callback.runtime.step == 14
    first = 14 if error is None else 11
    at = options.get("select_at", 99)
    was_selected = at <= first
    assert selected[first:] == [was_selected or step >= at for step in range(1, 15)]
    for name, value in ends[0].items():
        if name != "header":
            assert torch.equal(value, starts[0][name]), name
    if options:
        open_ = [(p != 0).any(0) for n, p in lora_parameters(trainer.model).items() if "lora_B" in n]
        assert float(torch.cat(open_).float().mean()) == 0.25


class Poison(TrainerCallback):
    """NaN in the gradients of the first two steps."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step < 2:
            next(p for n, p in model.named_parameters() if "lora_B" in n).grad.fill_(math.nan)


def test_a_short_train_goes_on_with_directions_that_are_selected(tmp_path):
    callback = StructLoRACallback(keep=0.5)
    trainer = sft(tmp_path, [callback], max_steps=24)
    trainer.train()
    trainer.args.max_steps = 3
    trainer.train()
    assert callback.runtime.has_selected and callback.runtime.step == 3
    callback.config = StructLoRAConfig(keep=0.25)  # a selection of its own, for which one step is too few
    trainer.args.max_steps = 1
    with pytest.raises(StructLoRAError, match="a run of 1 steps"):
        trainer.train()
    assert not callback.runtime.is_attached


@pytest.mark.parametrize("option", [{"coordinator": "gat"}, {"side": "both"}])
def test_a_train_with_other_options_starts_from_the_weights(option, tmp_path, caplog):
    callback = StructLoRACallback(gates="off")
    trainer = sft(tmp_path, [callback], max_steps=3)
    trainer.train()
    callback.config = StructLoRAConfig(gates="off", **option)
    trainer.train()
    assert "starts anew from the weights that stand" in caplog.text
    assert callback.runtime.config == callback.config and callback.runtime.step == 3


def test_the_selection_is_at_its_step_where_steps_were_skipped(tmp_path):
    selected = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            selected.append(callback.runtime.has_selected)

    callback = StructLoRACallback(keep=0.25, select_at=12)
    sft(tmp_path, [callback, Poison(), Look()], max_steps=14, max_grad_norm=0.0).train()
    assert callback.runtime.skipped_steps == 2 and selected.index(True) == 11


# What a first run has been, whose checkpoint-9 a run of other length goes on from -> its options, and the error
RESUMED = {
    "as it was": ({"max_steps": 40}, None),
    "longer": ({"max_steps": 60}, None),
    "shorter, past its step": ({"max_steps": 16}, None),
    "too short": ({"max_steps": 12, "select_at": 12}, "step 12 of a run of 12 steps"),
}


@pytest.mark.parametrize("run", RESUMED)
def test_a_resumed_run_of_another_length_selects(run, tmp_path):
    more, error = RESUMED[run]
    options = {"max_steps": 40, "save_strategy": "steps", "save_steps": 9}
    sft(tmp_path, [StructLoRACallback(keep=0.25), StopAt(9)], **options).train()
    callback = StructLoRACallback(keep=0.25, **{n: x for n, x in more.items() if n == "select_at"})
    trainer = sft(tmp_path, [callback], **{**options, "max_steps": more["max_steps"]})
    with pytest.raises(StructLoRAError, match=error) if error else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=True)
    if not error:
        assert callback.runtime.has_selected


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


def test_best_model_is_loaded_and_training_goes_on_from_it(tmp_path):
    callback = StructLoRACallback()
    trainer = sft(tmp_path, [callback, Scripted(best=2)], **{**BEST, "max_steps": 6})
    trainer.train()
    best = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert_same(renamed(best), weights_of(trainer.model))
    assert callback.runtime.step == 2
    trainer.train()
    assert state_of(tmp_path / "checkpoint-6")[0]["step"] == 6


def test_the_best_model_is_one_with_its_directions_selected(tmp_path):
    """The very best evaluation is of before the selection."""
    callback = StructLoRACallback(KEEP)
    trainer = sft(tmp_path, [callback, Scripted(best=4)], **BEST)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-10") and callback.runtime.has_selected
    open_ = [(p != 0).any(0) for n, p in lora_parameters(trainer.model).items() if "lora_B" in n]
    assert float(torch.cat(open_).float().mean()) == 0.25


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


def test_a_best_model_that_is_an_average_of_weights_stays_it(tmp_path):
    """What was swapped in for the evaluation is in the checkpoint's adapter."""

    class Average(TrainerCallback):
        kept = None

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if control.should_save:
                self.kept = weights_of(model)
                with torch.no_grad():
                    for parameter in lora_parameters(model).values():
                        parameter.mul_(0.5)

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                for name, parameter in lora_parameters(model).items() if self.kept else ():
                    parameter.copy_(self.kept[name])
            self.kept = None

    callback = StructLoRACallback()
    trainer = sft(tmp_path, [callback, Average(), Scripted(best=2)], **{**BEST, "max_steps": 6})
    trainer.train()
    best = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert_same(renamed(best), weights_of(trainer.model))


def test_a_checkpoint_that_nobody_announces_is_refused(tmp_path):
    if "enable_jit_checkpoint" not in TrainingArguments.__dataclass_fields__:
        pytest.skip("this Transformers writes none")
    trainer = sft(tmp_path, [StructLoRACallback()], enable_jit_checkpoint=True)
    with pytest.raises(StructLoRAError, match="`enable_jit_checkpoint`.*`save_steps`"):
        trainer.train()


def test_a_checkpoint_is_uploaded_with_its_state(tmp_path, monkeypatch):
    whole = []

    def push(trainer, folder):
        trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
        whole.append((Path(folder) / STATE).is_file())

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda trainer: None)
    trainer = sft(tmp_path, [StructLoRACallback()], max_steps=4, save_strategy="steps", save_steps=2)
    trainer.args.push_to_hub = True
    trainer.train()
    assert whole == [True, True]


def test_a_log_without_steps_and_no_learning_rate_end_no_run(tmp_path):
    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            state.log_history.append({"loss": 1.0, "eval_loss": 2.0})

    trainer = sft(tmp_path, [StructLoRACallback(), Note()], max_steps=2)
    trainer.optimizer = adamw(trainer.model)
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer)
    trainer.args.learning_rate = None
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("left", ["no checkpoint", "a checkpoint of plain LoRA"])
def test_a_best_checkpoint_that_is_not_ours(left, tmp_path):
    """Trainer warns of the first and takes the second; another `train()` goes on from what stands."""

    class Remove(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 13:
                best = tmp_path / "checkpoint-4"
                (best / STATE).unlink()
                if left == "no checkpoint":
                    (best / "adapter_model.safetensors").unlink()

    callback = StructLoRACallback()
    trainer = sft(tmp_path, [callback, Scripted(best=4), Remove()], **BEST)
    trainer.train()
    stands = weights_of(trainer.model)
    if left != "no checkpoint":
        assert_same(renamed(load_file(tmp_path / "checkpoint-4" / "adapter_model.safetensors")), stands)
    runtime = attach(trainer.model, adamw(trainer.model), **DATA)
    runtime.load_state_dict(callback._finished)
    for name, value in weights_of(trainer.model).items():
        torch.testing.assert_close(value, stands[name], atol=1e-6, rtol=0)


def interrupting(event: str) -> TrainerCallback:
    """Ctrl-C in the fourth step."""
    callback = TrainerCallback()

    def interrupt(*_):
        raise KeyboardInterrupt

    def at(args, state, control, optimizer=None, **kwargs):
        if state.global_step == 3 and event == "on_step_begin":
            optimizer.optimizer.register_step_pre_hook(interrupt)
        elif state.global_step == 3:
            interrupt()

    setattr(callback, event, at)
    return callback


@pytest.mark.parametrize(
    "optim, event, gates",
    [
        ("adamw_torch_fused", "on_step_end", "off"),
        ("adamw_torch_fused", "on_step_begin", "gaussian"),
        ("adamw_torch", "on_pre_optimizer_step", "off"),
        ("sgd", "on_step_begin", "off"),
        ("adamw_8bit", "on_step_begin", "off"),
        ("lion_8bit", "on_step_end", "off"),
    ],
)
def test_a_plain_run_after_an_interrupted_one_trains_what_is_saved(optim, event, gates, tmp_path):
    if "8bit" in optim:
        pytest.importorskip("bitsandbytes")
    callback = StructLoRACallback(gates=gates)
    trainer = sft(tmp_path, [callback, interrupting(event)], max_steps=6)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    start, clean = weights_of(trainer.model), copy.deepcopy(trainer.model)
    assert differing(weights_of(clean), start) == []
    saved = []
    for model in (trainer.model, clean):
        plain_run = sft(tmp_path / "plain", [], model=model, peft=False, optim=optim)
        plain_run.train()
        plain_run.save_model()
        written = load_file(tmp_path / "plain" / "adapter_model.safetensors")
        saved.append(
            {name: value.clone() for name, value in renamed(written).items()}
        )  # the next run writes there
    assert_same(saved[0], weights_of(trainer.model))
    assert set(differing(saved[0], start)) == set(start)
    for name, value in saved[1].items():
        torch.testing.assert_close(saved[0][name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("then", ["plain LoRA", "another callback"])
def test_an_interrupted_trainer_goes_on_without_its_callback(then, tmp_path):
    """It keeps its optimizer."""
    first, breaks = StructLoRACallback(), interrupting("on_step_end")
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
    assert first.runtime.step == 3


def test_a_runtime_that_is_detached_within_a_run_is_an_error(tmp_path):
    ours = StructLoRACallback()

    class Second(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                ours.runtime.detach()

    with pytest.raises(
        StructLoRAError, match="a runtime that is detached, at step 3 of .*leave out the call"
    ):
        sft(tmp_path, [ours, Second()]).train()


def test_another_adapter_that_is_made_active_trains_as_plain_lora(caplog):
    model = peft_model()
    model.add_adapter("other", model.peft_config["default"])
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_" in n], lr=1e-2)
    runtime = attach(model, optimizer, **DATA)
    train(model, "llama", optimizer, 1)
    assert "made active" not in caplog.text
    model.set_adapter("other")
    train(model, "llama", optimizer, 2)
    assert runtime.step == 1 and caplog.text.count("Adapter 'other' was made active") == 1


def test_adapters_with_a_runtime_each_take_turns(caplog):
    model = peft_model()
    model.add_adapter("other", model.peft_config["default"])
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_" in n], lr=1e-2)
    runtimes = []
    for name in ("default", "other"):
        model.set_adapter(name)
        runtimes.append(attach(model, optimizer, **DATA))
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        train(model, "llama", optimizer, 1)
    assert [runtime.step for runtime in runtimes] == [2, 1] and "made active" not in caplog.text


@pytest.mark.parametrize("when", ["interrupted", "done"])
def test_another_train_starts_from_weights_that_other_code_has_written(when, tmp_path):
    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                starts.append(weights_of(trainer.model))

    starts, callback, ctrl_c = [], StructLoRACallback(), interrupting("on_step_end")
    trainer = sft(tmp_path, [callback, Look(), *([ctrl_c] if when == "interrupted" else [])], max_steps=4)
    with pytest.raises(KeyboardInterrupt) if when == "interrupted" else contextlib.nullcontext():
        trainer.train()
    if when == "interrupted":
        trainer.remove_callback(ctrl_c)
    with torch.no_grad():
        for parameter in lora_parameters(trainer.model).values():
            parameter.mul_(0.5)
    written = weights_of(trainer.model)
    trainer.train()
    assert callback.runtime.step == 4
    for name, value in starts[1].items():
        torch.testing.assert_close(value, written[name], atol=1e-6, rtol=0)


def test_a_run_in_which_no_step_acts_is_an_error(tmp_path):
    class Elsewhere(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lm_head" in name)

    trainer = sft(tmp_path, [StructLoRACallback(), Elsewhere()])
    with pytest.raises(StructLoRAError, match="3 optimizer steps, none of which had a gradient.*set_adapter"):
        trainer.train()


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


def test_a_trainer_that_keeps_no_log_history(tmp_path):
    class Quiet(SFTTrainer):
        def log(self, logs, start_time=None):
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    callback = StructLoRACallback()
    trainer = sft(tmp_path, [callback], Quiet)
    trainer.train()
    assert callback.runtime.step == 3 and trainer.state.log_history == []


OPTIONS = {"beta": 0.5, "coordinator": "none"}
# Where options come from -> the trainer, its arguments, callbacks, and the options that act, or words of an error
OPTIONS_FROM = {
    "our arguments": (StructLoRASFTTrainer, OPTIONS, [], OPTIONS),
    "nowhere": (StructLoRASFTTrainer, None, [], {}),
    "our trainer": (partial(StructLoRASFTTrainer, structlora_config=OPTIONS), None, [], OPTIONS),
    "our arguments, and a callback without any": (SFTTrainer, OPTIONS, [{}], OPTIONS),
    "the same in both, and more": (
        SFTTrainer,
        OPTIONS,
        [{**OPTIONS, "gate_lr": 0.1}],
        {**OPTIONS, "gate_lr": 0.1},
    ),
    "others in both": (
        SFTTrainer,
        OPTIONS,
        [{"gate_lr": 0.1}],
        "beta=0.5, coordinator='none' in .* beta=1.0, coordinator='gcn'",
    ),
    "some of them in both": (
        SFTTrainer,
        OPTIONS,
        [StructLoRAConfig(coordinator="none")],
        "found beta=0.5 in .* beta=1.0",
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


METRICS = {
    "gate_openness",
    "nats",
    "closed_share",
    "effective_rank",
    "drift_energy",
    "gradient_cosine",
    "stream_cosine",
    "semantic_edges",
    "theta_norm",
    "skipped_steps",
}


def check_metrics(found: dict, prefix: str):
    values = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    assert values.keys() == METRICS
    assert 1 <= values["effective_rank"] <= 4
    assert 0 <= values["stream_cosine"] <= 1 + 1e-5


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
    scalars = {tag: [e.value for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}
    check_metrics({tag: values[-1] for tag, values in scalars.items()}, "train/structlora/")
    counts = {tag: len(values) for tag, values in scalars.items() if "structlora" in tag}
    assert counts.pop("train/structlora/gradient_cosine") == 2  # the first step has none
    assert set(counts.values()) == {3}
    check_metrics(trainer.state.log_history[2], "structlora/")
    assert not any(
        "structlora" in key
        for entry in trainer.state.log_history
        if "train_runtime" in entry
        for key in entry
    )


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


def saves_itself(asks: bool):
    """A Trainer with a `_save_checkpoint` of its own, which asks callbacks for their state or not."""

    class SavesItself(Trainer):
        def _save_checkpoint(self, model, trial):
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            self.save_model(str(folder))
            self._save_optimizer_and_scheduler(str(folder))
            self._save_rng_state(str(folder))
            for callback in self.callback_handler.callbacks:
                if asks and isinstance(callback, ExportableState):
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(folder / "trainer_state.json"))

    return SavesItself


@pytest.mark.parametrize("asks", [True, False])
def test_a_trainer_that_writes_its_own_checkpoints(asks, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "trainer_class": saves_itself(asks)}
    plain(tmp_path, [StructLoRACallback()], **options).train()
    callback = StructLoRACallback()
    plain(tmp_path, [callback], **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert callback.runtime.step == 4


def test_a_trainer_that_writes_checkpoints_elsewhere(tmp_path, caplog):
    class Elsewhere(Trainer):
        def _save_checkpoint(self, model, trial):
            self.save_model(str(tmp_path / "elsewhere"))

    plain(
        tmp_path, [StructLoRACallback()], trainer_class=Elsewhere, save_strategy="steps", save_steps=2
    ).train()
    assert "checkpoint-2" in caplog.text and "save_state" in caplog.text


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


def test_snapshots_at_the_start_are_of_what_trains(tmp_path, caplog):
    """Attaching gives all depths one lora_A: it comes first, wherever the callback is listed."""

    def snapshot(build):
        taken = Snapshot()
        trainer = build(taken)
        trainer.train()
        return {name: value for name, value in taken.taken.items() if "lora_A" in name}

    expected = snapshot(lambda taken: sft(tmp_path, [StructLoRACallback(), taken]))
    assert torch.equal(
        *(value for name, value in expected.items() if "q_proj" in name and "layers.2" not in name)
    )
    for build in (
        lambda taken: sft(tmp_path, [taken, StructLoRACallback()]),
        lambda taken: sft(tmp_path, [taken], StructLoRASFTTrainer),
    ):
        assert_same(snapshot(build), expected)
    assert "Snapshot" not in caplog.text

    def added_later(taken):
        trainer = sft(tmp_path, [taken])
        trainer.add_callback(StructLoRACallback())
        return trainer

    snapshot(added_later)
    assert "Snapshot ran before StructLoRA" in caplog.text


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


def test_a_second_train_has_a_schedule_of_its_own(tmp_path):
    """At a hundredth of the rate, the coordinator still learns at its own rate's share of the new peak."""

    def moved(first_rate):
        callback = StructLoRACallback()
        trainer = sft(tmp_path, [callback], learning_rate=first_rate)
        trainer.train()
        before = thetas_of(callback).clone()
        trainer.optimizer = None  # a new one, of the new rate
        trainer.args.learning_rate = 1e-4
        trainer.train()
        return (thetas_of(callback) - before).abs().max().item()

    assert moved(1e-2) > 0.3 * moved(1e-4)


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
