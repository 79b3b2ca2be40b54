"""The method on one page does what the package does."""

from __future__ import annotations

import functools

import pytest
import torch

from structlora_trl import StructLoRAConfig, attach
from structlora_trl.core import one_page
from structlora_trl.core.graph import DepthGraph
from tests.support.tiny import FAMILIES, adamw, logits_of, lora_parameters, loss_of, peft_model, train

STEPS = 12


@pytest.mark.parametrize("family, gates", [("llama", "gaussian"), ("llama", "off"), ("bert", "gaussian")])
def test_one_page_trains_as_the_package_does(family, gates, monkeypatch):
    """Both draw noise from torch's generator."""
    monkeypatch.setattr(DepthGraph, "redraw_every", 3)
    config = StructLoRAConfig(semantic_threshold=0.0, gates=gates)

    def model_of():
        torch.manual_seed(0)
        return peft_model(family, targets=FAMILIES[family].linear)

    def loss(model, step):
        torch.manual_seed(step)
        return loss_of(model, family, step)

    ours, plain = model_of(), model_of()
    optimizer = adamw(ours)
    data = {"examples": 40, "batch_size": 4}
    runtime = attach(ours, optimizer, config, **data)
    train(ours, family, optimizer, STEPS)
    plain.train()
    one_page.train(
        plain, adamw(plain), [functools.partial(loss, plain, step) for step in range(STEPS)], config, **data
    )
    assert sum(m.graph.semantic_edge_count for m in runtime.maps) > 0
    start = lora_parameters(model_of())
    for name, parameter in lora_parameters(plain).items():
        expected = lora_parameters(ours)[name]
        assert (parameter - start[name]).abs().max() > 1e-3
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits_of(plain, family), logits_of(ours, family), rtol=1e-4, atol=1e-4)
