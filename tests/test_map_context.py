"""Whatever torch state surrounds a call, the map gives what it gives without: fp32, and nothing stale."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from structlora_trl import load_state, save_state
from structlora_trl.shrink.load_adapter import read_saved
from tests.support.tiny import (
    assert_same,
    attached,
    default_dtype,
    logits_of,
    tensors_of,
    train,
    weights_of,
)

STEPS = 3
SELECTING = {"keep": 0.5, "select_at": 10}
SELECTED = 11  # steps, after which directions are closed


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


def test_autocast_keeps_no_cast_of_weights_that_are_gone():
    """An evaluation after a step, in one `with`: autocast reuses casts of weights until its end."""
    model, optimizer, _ = attached()
    with autocast():
        train(model, "llama", optimizer, STEPS)
        found = logits_of(model, "llama")
    with autocast():
        assert torch.equal(logits_of(model, "llama"), found)
