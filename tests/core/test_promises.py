"""The design's promises on every model family: chain rule (2) and export (5). The others are in each row of set-ups."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.support.chain_rule import assert_chain_rule
from tests.support.setups import quantised
from tests.support.tiny import (
    FAMILIES,
    assert_same,
    attached,
    base_model,
    inits,
    logits_of,
    loss_of,
    peft_model,
    train,
    warm_up,
    weights_of,
)

FP32, BF16 = torch.float32, torch.bfloat16

# family, init, all linear modules, dropout, dtype
CASES = [
    *((family, init, False, 0.0, FP32) for family in FAMILIES for init in inits(family)),
    *((family, "warm", True, 0.1, FP32) for family in FAMILIES),
    *((family, "warm", False, 0.0, BF16) for family in FAMILIES),
    ("llama", "dora", True, 0.1, BF16),
    ("llama", "rslora", True, 0.1, BF16),
]


@pytest.mark.parametrize(
    "family, init, all_linear, dropout, dtype",
    CASES,
    ids=["-".join(map(str, case)).replace("torch.", "") for case in CASES],
)
def test_chain_rule(family, init, all_linear, dropout, dtype):
    targets = FAMILIES[family].linear if all_linear else None
    model = peft_model(family, init, targets=targets, dropout=dropout, dtype=dtype)
    assert_chain_rule(model, family, tolerance=1e-5 if dtype is FP32 else 3e-2)


OPTIONS = [
    {"side": "both"},
    {"side": "write"},
    {"coordinator_layers": 3},
    {"coordinator": "none"},
    {"edges": "similarity"},
    {"noise": "off"},
]


@pytest.mark.parametrize(
    "family, init", [("llama", "warm"), ("qwen3_moe", "warm"), ("mixture", "warm"), ("mixture", "vera")]
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_chain_rule_of_every_switch(options, family, init):
    assert_chain_rule(peft_model(family, init, targets=FAMILIES[family].linear), family, **options)


def test_chain_rule_with_clipping():
    assert_chain_rule(peft_model("llama", "warm"), "llama", clip=0.01, tolerance=2e-5)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_chain_rule_with_accumulation_and_checkpointing(reentrant):
    model = peft_model("llama", "warm", dropout=0.1)
    assert_chain_rule(model, "llama", batches=(0, 1, 2, 3), reentrant=reentrant)


def test_chain_rule_on_a_4_bit_base():
    pytest.importorskip("bitsandbytes")
    model = get_peft_model(quantised(4), LoraConfig(r=4, target_modules=FAMILIES["llama"].linear))
    warm_up(model)
    model.gradient_checkpointing_disable()  # it would cut the reference's graph
    assert_chain_rule(model, "llama")


def test_chain_rule_with_lora_A_frozen():
    model = peft_model("llama", "warm", targets=FAMILIES["llama"].linear)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    assert_chain_rule(model, "llama", side="write")


@pytest.mark.parametrize("family, init", [(family, init) for family in FAMILIES for init in inits(family)])
def test_what_stands_is_the_plain_adapter_that_is_saved(family, init, tmp_path):
    model, optimizer, runtime = attached(peft_model(family, init, targets=FAMILIES[family].linear))
    train(model, family, optimizer, steps=4)
    trained, weights = logits_of(model, family), weights_of(model)
    model.train()
    noisy = [loss_of(model, family, 0) for _ in range(2)]
    noisy[0].backward()
    # A training forward changes no parameter; two of them differ where a gate acts.
    assert_same(weights, weights_of(model))
    assert not (runtime.gated_count and torch.equal(*noisy))
    model.save_pretrained(tmp_path)  # within a step
    loaded = PeftModel.from_pretrained(base_model(family), tmp_path)
    # PiSSA's base weights are recomputed by an SVD at load, which costs a few more digits.
    assert (logits_of(loaded, family) - trained).abs().max() <= (1e-5 if init == "pissa" else 1e-6)
    runtime.detach()
    assert (logits_of(model, family) - trained).abs().max() == 0
    assert (logits_of(model.merge_and_unload(), family) - trained).abs().max() <= 1e-5


# what the adapter is of -> why its modules have no gates
WITHOUT_GATES = {
    "pissa": ("llama", "pissa", {}, "keeps base weights"),
    "vera": ("llama", "vera", {}, "VeRA"),
    "embeddings": ("llama", "fresh", {"targets": ["embed_tokens"]}, "embeddings"),
    "experts": ("mixtral", "fresh", {}, "experts in one parameter"),
}


@pytest.mark.parametrize("case", WITHOUT_GATES)
def test_modules_without_gates_are_told(case):
    family, init, options, why = WITHOUT_GATES[case]
    model = peft_model(family, init, **options)
    _, _, runtime = attached(model, coordinator="none")
    assert re.search(rf"none on \d+ \(.*{why}", repr(runtime))
