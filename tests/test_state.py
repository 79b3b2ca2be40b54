"""The state: what may change on resume and what is refused, files of other runs, and damage."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from structlora_trl import StructLoRAConfig, StructLoRAError, attach
from structlora_trl.core.graph import DepthGraph
from structlora_trl.state import SHAPING, STATE_NAME, load_state, save_state
from tests.support.tiny import (
    DATA,
    FAMILIES,
    adamw,
    assert_same,
    attached,
    differing,
    lora_parameters,
    loss_of,
    peft_model,
    tensors_of,
    train,
    weights_of,
)

STEPS = 3
OPTIONS = {"edges": "adjacency", "coordinator_lr": 0.1}


@dataclass
class Loop:
    """A bare loop, and how to leave and enter it."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    runtime: object

    @classmethod
    def start(cls, model=None, **options):
        model = model or peft_model()
        optimizer = adamw(model)
        return cls(model, optimizer, attach(model, optimizer, {**OPTIONS, **options}, **DATA))

    def train(self, steps=STEPS):
        train(self.model, "llama", self.optimizer, steps, first=self.runtime.step)
        return self

    def weights(self):
        return weights_of(self.model)

    def leave(self, folder):
        save_state(self.runtime, folder)
        return self.weights(), copy.deepcopy(self.optimizer.state_dict())

    def enter(self, folder, weights, moments):
        with torch.no_grad():
            for name, parameter in lora_parameters(self.model).items():
                parameter.copy_(weights[name])
        self.optimizer.load_state_dict(copy.deepcopy(moments))
        load_state(self.runtime, folder)
        return self


def assert_refused(load, loop: Loop, message: str):
    before, weights = loop.runtime.state_dict(), loop.weights()
    with pytest.raises(StructLoRAError, match=f"(?s){message}"):
        load()
    assert_same(before, loop.runtime.state_dict())
    assert_same(weights, loop.weights())


# --- options -------------------------------------------------------------------------------------------------------

# Every option, with another value, and what it needs beside it. A new option needs a row: may it change on resume?
CHANGES = {
    "gates": ({"gates": "gumbel"}, {}),
    "beta": ({"beta": 0.3}, {}),
    "gate_openness": ({"gate_openness": 0.5}, {}),
    "gate_lr": ({"gate_lr": 0.1}, {}),
    "keep": ({"keep": 0.5, "select_at": 100}, {}),
    "select_at": ({"select_at": 14}, {"keep": 0.5, "select_at": 100}),
    "coordinator": ({"coordinator": "gat"}, {}),
    "coordinator_layers": ({"coordinator_layers": 2}, {}),
    "coordinator_lr": ({"coordinator_lr": 1.0}, {}),
    "side": ({"side": "write"}, {}),
    "edges": ({"edges": "hybrid"}, {}),
    "semantic_top_k": ({"semantic_top_k": 1}, {"edges": "similarity", "semantic_threshold": -0.99}),
    "semantic_threshold": ({"semantic_threshold": 0.9}, {"edges": "hybrid", "semantic_threshold": -0.99}),
    "align_init": ({"align_init": False}, {}),
    "roles": ({"roles": {"q_proj": "write"}}, {}),
}
REFUSED = {*SHAPING, "side", "roles"}
WHERE = ("adapter_name", "peft_module")  # say where the adapter is, not how it is trained


@pytest.mark.parametrize("name", [f.name for f in fields(StructLoRAConfig) if f.name not in WHERE])
def test_each_option_is_refused_on_resume_or_acts_from_there_on(name, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(DepthGraph, "redraw_every", 2)
    change, others = CHANGES[name]

    def start(**options):
        return Loop.start(peft_model(targets=FAMILIES["llama"].linear), **options)

    saved = start(**others).train().leave(tmp_path)
    changed = start(**{**others, **change})
    if name in REFUSED:
        before = re.escape(repr({**StructLoRAConfig().options(), **OPTIONS}[name]))
        message = (
            "sides .*set `side` and `roles`"
            if name in ("side", "roles")
            else f"resume with {name}={before}; or"
        )
        assert_refused(lambda: load_state(changed.runtime, tmp_path), changed, message)
        return
    changed.enter(tmp_path, *saved)
    assert f"{name} (" in caplog.text
    assert_same(saved[0], changed.weights())
    going_on = start(**others).enter(tmp_path, *saved)
    steps = 12 if name == "select_at" else STEPS
    assert differing(tensors_of(going_on.train(steps).runtime), tensors_of(changed.train(steps).runtime))


@pytest.mark.parametrize(
    "here, there, message",
    [
        ({}, {"rank": 2}, r"shape \[3, 2, 32, 32\] of 'model.layers.*q_proj'.*Expected \[3, 4, 32, 32\]"),
        ({}, {"targets": FAMILIES["llama"].linear}, "with .*down_proj"),
        ({}, {"targets": ["q_proj"]}, "without .*v_proj"),
        (
            {"layers_to_transform": [0, 1]},
            {"layers_to_transform": [1, 2]},
            r"modules .*layers.1.*Expected .*layers.0",
        ),
        ({}, {"init": "pissa"}, "a start other than zero True of .*Expected False"),
    ],
)
def test_states_of_other_adapters_are_refused(here, there, message, tmp_path):
    Loop.start(peft_model(**there)).train(1).leave(tmp_path)
    loop = Loop.start(peft_model(**here)).train(1)
    message += ".*resume with the configuration and the LoraConfig"
    assert_refused(lambda: load_state(loop.runtime, tmp_path), loop, message)


def test_a_state_dict_can_be_loaded_again_and_again():
    """Nothing that is trained is shared with it."""
    loop = Loop.start().train()
    state = loop.runtime.state_dict()
    kept = copy.deepcopy(state)
    weights = loop.weights()
    for _ in range(2):
        loop.train()
        loop.model.load_state_dict(weights, strict=False)
        loop.runtime.load_state_dict(state)
        assert_same(state, kept)
        assert_same(state, loop.runtime.state_dict())


def test_a_state_beside_other_weights_says_so(tmp_path, caplog):
    """An adapter that was not loaded, for one; what stands is trained on."""
    weights, _ = Loop.start().train().leave(tmp_path)
    other = Loop.start()
    stands = {n: 2 * x if "q_proj.lora_A" in n else x for n, x in weights.items()}
    other.model.load_state_dict(stands, strict=False)
    load_state(other.runtime, tmp_path)
    assert (
        "Other LoRA weights stand" in caplog.text
        and "1 kinds, model.layers.*.self_attn.q_proj" in caplog.text
    )
    assert_same(other.weights(), stands)


def test_a_selection_to_come_comes_on_resume(tmp_path):
    """A step that is skipped for its gradients counts."""

    def go_on(loop, until):
        loop.model.train()
        for step in range(loop.runtime.acted_steps, until):
            torch.manual_seed(step)
            loss_of(loop.model, "llama", step).backward()
            if step in (7, 8):
                next(p for p in loop.model.parameters() if p.grad is not None).grad.fill_(torch.nan)
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        return loop

    first = go_on(Loop.start(keep=0.5, select_at=12), 10)
    saved = first.leave(tmp_path)
    assert not first.runtime.has_selected
    go_on(first, 15)
    second = go_on(Loop.start(keep=0.5, select_at=12).enter(tmp_path, *saved), 15)
    assert second.runtime.has_selected and second.runtime.skipped_steps == 2
    assert_same(first.weights(), second.weights())


def test_weights_that_are_no_numbers_are_saved_and_refused_on_resume(tmp_path):
    """Saving them ends no run, as it ends none of plain LoRA."""
    model, _, runtime = attached(gates="off", coordinator="none")
    with torch.no_grad():
        next(iter(lora_parameters(model).values())).fill_(torch.nan)
    save_state(runtime, tmp_path)
    with pytest.raises(StructLoRAError, match="NaN or infinite numbers"):
        load_state(runtime, tmp_path)


# --- damage --------------------------------------------------------------------------------------------------------

# What befell a file -> its content then
DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "another's": lambda content: b"<html>not found</html>",
    "a header that is no JSON": lambda content: content[:8] + b"?" + content[9:],
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A state file, its weights, and another loop that is to go on from it."""
    folder = tmp_path_factory.mktemp("state")
    weights, _ = Loop.start(side="both").train().leave(folder)
    return folder, weights, Loop.start(side="both").train(2)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_before_anything_changes(damage, two, tmp_path):
    folder, _, loop = two
    (tmp_path / STATE_NAME).write_bytes(DAMAGE[damage]((folder / STATE_NAME).read_bytes()))
    assert_refused(lambda: load_state(loop.runtime, tmp_path), loop, f"{STATE_NAME} damaged")


# How a state is spoilt -> what is in place of a tensor (None: nothing), which tensor, words of the message
ODD = {
    "no offset": ("offset_B", None, "nothing as '.*offset_B"),
    "an offset of another shape": ("offset_A", torch.zeros(3), r"\[3\] as '.*offset_A"),
    "a start of another dtype": ("origin_A", torch.float64, "float64 of shape .* as '.*origin_A"),
    "a number that is none": (
        "coordinators.B.theta",
        torch.full((1, 4, 4), torch.nan),
        "NaN or infinite numbers",
    ),
    "a stranger": ("of_nobody", torch.zeros(2), "of_nobody"),
}


@pytest.mark.parametrize("name", ODD)
def test_tensors_that_are_not_a_runs_are_refused_before_anything_changes(name, two):
    """In the last kind: those before it are not loaded either."""
    loop = two[-1]
    key, value, words = ODD[name]
    state = dict(loop.runtime.state_dict())
    key = f"{loop.runtime.kinds[-1].name}/{key}"
    if value is None:
        del state[key]
    else:
        state[key] = value if isinstance(value, torch.Tensor) else state[key].to(value)
    assert_refused(lambda: loop.runtime.load_state_dict(state), loop, words)


def rewritten(source: Path, target: Path, **metadata) -> None:
    """A copy of a state file with some of its header replaced; None removes an entry."""
    with safe_open(source / STATE_NAME, "pt") as file:
        kept = {name: value for name, value in {**file.metadata(), **metadata}.items() if value is not None}
        save_file({name: file.get_tensor(name) for name in file.keys()}, target / STATE_NAME, kept)


@pytest.mark.parametrize("action", [save_state, load_state])
def test_the_path_of_a_file_is_no_folder(action, tmp_path):
    with pytest.raises(StructLoRAError, match="the path of a file.*a folder"):
        action(Loop.start().runtime, tmp_path / STATE_NAME)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("format", ["99", None])
def test_states_of_other_formats_are_named(two, tmp_path, format):
    folder, _, loop = two
    rewritten(folder, tmp_path, format=format)
    message = f"in format {format}.*the version of structlora-trl that wrote it"
    assert_refused(lambda: load_state(loop.runtime, tmp_path), loop, message)


def test_options_that_a_state_lacks_take_the_value_they_had(two, tmp_path):
    """A version that came before an option, and one that came after."""
    folder, weights, loop = two
    with safe_open(folder / STATE_NAME, "pt") as file:
        options = json.loads(file.metadata()["options"])
    rewritten(
        folder, tmp_path, options=json.dumps({n: v for n, v in options.items() if n != "semantic_top_k"})
    )
    loop.model.load_state_dict(weights, strict=False)
    load_state(loop.runtime, tmp_path)
    assert_same({n: x for n, x in load_file(folder / STATE_NAME).items()}, tensors_of(loop.runtime))
    rewritten(folder, tmp_path, options=json.dumps({**options, "of_a_later_version": 1}))
    assert_refused(lambda: load_state(loop.runtime, tmp_path), loop, "of_a_later_version")
