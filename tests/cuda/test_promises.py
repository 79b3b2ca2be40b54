"""The design's promises on a GPU, in fp32, bf16 and fp16 with a GradScaler; promise 3 is in `test_engines.py`."""

from __future__ import annotations

import pytest

from tests.cuda.precisions import PRECISIONS
from tests.support.chain_rule import assert_chain_rule
from tests.support.promises import keep_promises
from tests.support.tiny import FAMILIES, assert_same, attached, logits_of, loss_of, peft_model, weights_of

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("deterministic")]

families = pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "llama")]
)
precisions = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)


@families
@precisions
def test_1_attaching_changes_no_output(precision, family, device, record_property):
    model = precision.model(family, device)
    before = logits_of(model, family, autocast=precision.autocast)
    attached(model)
    difference = (logits_of(model, family, autocast=precision.autocast) - before).abs().max().item()
    record_property("largest difference of logits", difference)
    assert difference <= 1e-6


@families
@precisions
def test_2_chain_rule(precision, family, device, record_property):
    options = {"autocast": precision.autocast, "scaler": precision.scaler(device)}
    error = assert_chain_rule(
        precision.model(family, device), family, tolerance=precision.gradients, **options
    )
    record_property("largest relative error of gradients", error)


@precisions
def test_4_to_6_resuming_saving_and_switching_off(precision, device, tmp_path):
    """What each row of `tests/test_setups.py` must do."""
    keep_promises(precision.setup(device), tmp_path)


def test_7_bad_gradients_skip_the_step(device):
    model, optimizer, runtime = attached(peft_model().to(device))
    before = weights_of(model)
    model.train()
    (loss_of(model, "llama", 0) * float("inf")).backward()
    optimizer.step()
    assert (runtime.step, runtime.skipped_steps) == (0, 1)
    assert_same(before, weights_of(model))
