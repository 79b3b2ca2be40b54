"""The design's promises on a GPU, in fp32, bf16 and fp16 with a GradScaler; promise 3 is in `test_engines.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch

from tests.support import loops
from tests.support.chain_rule import assert_chain_rule
from tests.support.promises import keep_promises
from tests.support.setups import Setup
from tests.support.tiny import (
    FAMILIES,
    assert_same,
    attached,
    base_model,
    logits_of,
    lora_parameters,
    loss_of,
    peft_model,
    weights_of,
)

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("deterministic")]


@dataclass(frozen=True)
class Precision:
    """One precision that people train in.

    Args:
        base (`torch.dtype`): of the frozen weights.
        adapter (`torch.dtype`): of the LoRA factors.
        gradients (`float`): largest relative error of gradients.
        autocast (`torch.dtype`, *optional*): what the forward pass is cast to; a GradScaler scales the loss.
    """

    base: torch.dtype
    adapter: torch.dtype
    gradients: float
    autocast: torch.dtype | None = None

    def model(self, family: str, device: str) -> torch.nn.Module:
        """A tiny model under a warm adapter on all its linear modules."""
        model = peft_model(family, "warm", targets=FAMILIES[family].linear, dtype=self.base).to(device)
        for parameter in lora_parameters(model).values():
            parameter.data = parameter.data.to(self.adapter)
        return model


class HalfScaling(loops.Scaling):
    """fp16 autocast over an fp16 base and an fp32 adapter, with a GradScaler and clipping."""

    def loss(self, index):
        with torch.autocast(self.device, torch.float16):
            return super().loss(index)


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32, 1e-5),
    "bf16": Precision(torch.bfloat16, torch.bfloat16, 3e-2),
    "fp16 with GradScaler": Precision(torch.float16, torch.float32, 3e-2, autocast=torch.float16),
}
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
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10) if precision.autocast else None
    error = assert_chain_rule(
        precision.model(family, device),
        family,
        tolerance=precision.gradients,
        autocast=precision.autocast,
        scaler=scaler,
    )
    record_property("largest relative error of gradients", error)


@precisions
def test_4_to_6_resuming_saving_and_switching_off(precision, device, tmp_path):
    """What each row of `tests/test_setups.py` must do."""
    loop = HalfScaling if precision.autocast else loops.Loop
    dtype = precision.adapter if precision.adapter is precision.base else None
    row = Setup("", base=partial(base_model, "llama", precision.base), dtype=dtype, loop=loop)
    keep_promises(row.on(device), tmp_path)


def test_7_bad_gradients_skip_the_step(device):
    model, optimizer, runtime = attached(peft_model().to(device))
    before = weights_of(model)
    model.train()
    (loss_of(model, "llama", 0) * float("inf")).backward()
    optimizer.step()
    assert (runtime.step, runtime.skipped_steps) == (0, 1)
    assert_same(before, weights_of(model))
