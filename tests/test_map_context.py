"""Whatever torch state surrounds a call, the map gives what it gives without: fp32, and nothing stale."""

from __future__ import annotations

import ast
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import structlora_trl
from structlora_trl import load_state, save_state
from structlora_trl.shrink.load_adapter import read_saved
from tests.support.tiny import (
    assert_same,
    attached,
    default_dtype,
    logits_of,
    loss_of,
    tensors_of,
    train,
    weights_of,
)

STEPS = 3
SELECTING = {"keep": 0.5, "select_at": 10}
SELECTED = 11  # steps, after which directions are closed
PACKAGE = Path(structlora_trl.__file__).parent


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


SURROUNDINGS = {
    "autocast": autocast,
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float64": lambda: default_dtype(torch.float64),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_run_within_leaves_what_resumes_and_reads_outside(name, tmp_path):
    """Attach, every step, saving and loading within: the adapter is its state's, and loads outside."""
    with SURROUNDINGS[name]():
        model, optimizer, runtime = attached(**SELECTING)
        train(model, "llama", optimizer, SELECTED)
        save_state(runtime, tmp_path)
        model.save_pretrained(tmp_path)
        read_saved(tmp_path)  # adapter and state belong together
    expected = weights_of(model)
    for surroundings in (SURROUNDINGS[name], nullcontext):
        with surroundings():
            again, _, resumed = attached(**SELECTING)
            again.load_state_dict(expected, strict=False)
            load_state(resumed, tmp_path)
            assert_same(tensors_of(resumed), tensors_of(runtime))
    assert read_saved(tmp_path).maps is not None


def test_a_step_in_inference_mode_leaves_nothing_that_cannot_train():
    model, optimizer, runtime = attached()
    for step in range(STEPS):
        model.train()
        loss_of(model, "llama", step).backward()
        with torch.inference_mode():
            optimizer.step()
        optimizer.zero_grad()
    assert runtime.step == STEPS


def test_autocast_keeps_no_cast_of_weights_that_are_gone():
    """An evaluation after a step, in one `with`: autocast reuses casts of weights until its end."""
    model, optimizer, _ = attached()
    with autocast():
        train(model, "llama", optimizer, STEPS)
        found = logits_of(model, "llama")
    with autocast():
        assert torch.equal(logits_of(model, "llama"), found)


@pytest.mark.slow
def test_a_compiled_training_step():
    """Forward, backward and optimizer in one function, against the same uncompiled; of the optimizer's step alone, see set-ups."""
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, optimizer, runtime = attached()
        model.train()

        def step(index, model=model, optimizer=optimizer):
            loss_of(model, "llama", index).backward()
            optimizer.step()
            optimizer.zero_grad()

        if compiled:
            step = torch.compile(step, backend="eager")
        for index in range(STEPS):
            step(index)
        assert runtime.step == STEPS
        runs.append(weights_of(model))
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-4, atol=1e-5)


FACTORIES = {
    "tensor",
    "as_tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "linspace",
    "eye",
    "rand",
    "randn",
}


def test_every_tensor_names_its_dtype_and_device():
    """A default dtype or device of the user's is for the user's tensors."""
    unnamed = []
    for path in set(PACKAGE.rglob("*.py")) - {PACKAGE / "core" / "one_page.py"}:  # which is for reading
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) not in {
                f"torch.{f}" for f in FACTORIES
            }:
                continue
            if not {"dtype", "device"} <= {keyword.arg for keyword in node.keywords}:
                unnamed.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not unnamed
