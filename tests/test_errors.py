"""Whatever StructLoRA cannot act on stops with an error that says what was found, what was expected and what to do."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from structlora_trl import StructLoRACallback, StructLoRAError, attach
from structlora_trl.errors import refuse_unwritable
from structlora_trl.state import STATE_NAME
from tests.support.jobs import sft
from tests.support.launching import said_in_one_rank
from tests.support.one_rank import UNSERVED
from tests.support.setups import freeze, second_adapter
from tests.support.tiny import DATA, FAMILIES, adamw, attached, peft_model, train


def changed(change, **options):
    model = peft_model(**options)
    change(model)
    return model


def tie(model):
    """A user ties lora_B of all depths by hand."""
    first, *others = (layer.self_attn.q_proj for layer in model.get_base_model().model.layers)
    for other in others:
        other.lora_B["default"].weight = first.lora_B["default"].weight


KEEP = {"keep": 0.5, "select_at": 10}
# case -> model, options, names that the message holds; set-ups that stop with an error are in `support/setups.py`
CASES = {
    "no such adapter": (peft_model, {"adapter_name": "mine"}, "'mine'.*'default'"),
    "not active": (
        lambda: changed(second_adapter),
        {"adapter_name": "other"},
        r"'other'.*default.*model.set_adapter\('other'\)",
    ),
    "all frozen": (lambda: changed(freeze("lora_")), {}, "'default'.*is_trainable=True"),
    "lora_B frozen": (lambda: changed(freeze("lora_B")), KEEP, "lora_B of .*q_proj'.*remove `keep`"),
    "role of nothing": (peft_model, {"roles": {"mx": "read"}}, "'mx'.*q_proj"),
    "one depth": (
        lambda: peft_model(layers_to_transform=[1]),
        {},
        "one depth.*a number between dots.*coordinator='none'",
    ),
    "tied by hand": (lambda: changed(tie), {}, "in one memory.*untie"),
    "directions not at zero": (lambda: peft_model(init="pissa"), KEEP, "do not start at zero"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_models_are_refused(case):
    build, options, message = CASES[case]
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(StructLoRAError, match=f"(?s)StructLoRA found .*{message}"):
        attach(model, optimizer, **options, **DATA)
    assert all(map(torch.equal, before, model.parameters()))


def test_attaching_twice_ends_the_first_run_and_says_so(caplog):
    model, optimizer, first = attached()
    second = attach(model, optimizer, **DATA)
    assert not first.is_attached and "that run ends here" in caplog.text
    train(model, "llama", optimizer, 1)
    assert (first.step, second.step) == (0, 1)


@pytest.mark.parametrize("kept", [False, True], ids=["dropped gradients", "kept gradients"])
def test_parameters_replaced_after_attaching(kept):
    model, optimizer, _ = attached()
    train(model, "llama", optimizer, 1)
    optimizer.zero_grad(set_to_none=not kept)
    model.load_state_dict(
        {n: value.clone() for n, value in model.state_dict().items()}, strict=False, assign=True
    )
    model.train()
    model(**FAMILIES["llama"].batch(0)).loss.backward()
    with pytest.raises(StructLoRAError, match="12 LoRA parameters.*`assign=True`"):
        optimizer.step()


class Unhooked(torch.optim.Optimizer):
    """A wrapper that does not call its base class's `__init__`."""

    def __init__(self, inner):
        self.inner, self.param_groups, self.state, self.defaults = inner, inner.param_groups, inner.state, {}

    def step(self, closure=None):
        self.inner.step(closure)


def test_optimizers_that_run_no_hooks():
    model = peft_model()
    with pytest.raises(StructLoRAError, match="Unhooked"):
        attach(model, Unhooked(adamw(model)), **DATA)


class Meddles(TrainerCallback):
    """Does what a script may do at events of a run."""

    def __init__(self, begin=None, end=None):
        self.begin, self.end = begin, end

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.begin is not None:
            self.begin(model, optimizer)

    def on_step_end(self, args, state, control, **kwargs):
        if self.end is not None:
            self.end()


def step_unseen(model, optimizer):
    """Steps by a way that torch's hooks do not see, as optimizers do that replace `step` on the instance."""
    inner = optimizer.optimizer
    bare = type(inner).step
    while hasattr(bare, "__wrapped__"):
        bare = bare.__wrapped__
    inner.step = torch.no_grad()(lambda closure=None: bare(inner))


def train_elsewhere(model, optimizer):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lm_head" in name)


# What is wrong in a run -> callbacks beside ours, training arguments, and names that the message holds
RUNS = {
    "two callbacks": (lambda ours: [StructLoRACallback(keep=0.3)], {}, "2 StructLoRA callbacks"),
    "no adapter": (lambda ours: [], {"peft": False}, "peft_config"),
    "a step without hooks": (lambda ours: [Meddles(begin=step_unseen)], {}, "AdamW.step.*optim"),
    "an adapter that never trains": (
        lambda ours: [Meddles(begin=train_elsewhere)],
        {},
        "3 optimizer steps, none of which had a gradient.*set_adapter",
    ),
    "detached within the run": (
        lambda ours: [Meddles(end=lambda: ours.runtime.detach())],
        {},
        "a runtime that is detached, at step 2 of .*leave out the call",
    ),
    "a checkpoint that nobody announces": (
        lambda ours: [],
        {"enable_jit_checkpoint": True},
        "`enable_jit_checkpoint`.*`save_steps`",
    ),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_stops(run, tmp_path):
    callbacks, options, message = RUNS[run]
    if not options.keys() <= {"peft", *TrainingArguments.__dataclass_fields__}:
        pytest.skip(f"this Transformers has no {[*options]}")
    ours = StructLoRACallback()
    with pytest.raises(StructLoRAError, match=message):
        sft(tmp_path, [ours, *callbacks(ours)], **options).train()


def test_callback_outside_a_trainer():
    with pytest.raises(StructLoRAError, match="`transformers.Trainer`.*attach"):
        StructLoRACallback().on_train_begin(None, None, None)


def test_resume_without_our_state(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    sft(tmp_path, None, **options).train()
    with pytest.raises(StructLoRAError, match=f"{STATE_NAME} in .*checkpoint-4.*`resume_from_checkpoint`"):
        sft(tmp_path, [StructLoRACallback()], **options).train(resume_from_checkpoint=True)


def test_distributed_launches_are_refused(monkeypatch):
    model = peft_model()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(StructLoRAError, match="2 processes.*DDP"):
        attach(model, adamw(model), **DATA)


@pytest.fixture(scope="module")
def said():
    return said_in_one_rank("unserved")


@pytest.mark.parametrize("name", UNSERVED)
def test_unserved_engines_are_refused_by_name(name, said):
    assert re.search(UNSERVED[name][1], said[name])


def test_errors_have_three_parts_and_survive_pickling():
    error = StructLoRAError("this", "that", "do so")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == "StructLoRA found this. Expected that. Fix: do so."
    assert re.search(r"found .* Expected .* Fix: ", str(error))


def test_a_folder_that_the_user_may_not_write_to(tmp_path, monkeypatch):
    """Before the work, with the folder's name. Root may write anywhere, so that the answer is asked for here."""
    refuse_unwritable(tmp_path / "new" / "adapter")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(StructLoRAError, match=re.escape(f"no permission to write in {tmp_path}, above")):
        refuse_unwritable(tmp_path / "new" / "adapter")
