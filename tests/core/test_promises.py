"""The design's promises on every model family: chain rule (2) and export (5). The others are in each row of set-ups."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.support.chain_rule import assert_chain_rule
from tests.support.setups import quantised
from tests.support.tiny import (
    FAMILIES,
    attached,
    base_model,
    inits,
    logits_of,
    peft_model,
    train,
    warm_up,
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
    {"side": "write", "activation": "identity"},
    {"coordinator_layers": 3},
    {"share_gates": True},
    {"filter": "none"},
    {"coordinator": "none"},
    {"edges": "similarity"},
    {"regularizer": "cosine", "side": "both"},
    {"regularizer": "laplacian", "regularizer_weight": 0.5},
]


@pytest.mark.parametrize(
    "family, init", [("llama", "warm"), ("qwen3_moe", "warm"), ("mixture", "warm"), ("mixture", "vera")]
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_chain_rule_of_every_switch(options, family, init):
    assert_chain_rule(peft_model(family, init, targets=FAMILIES[family].linear), family, **options)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"head_gates": True}),
        ("llama", {"head_gates": True, "side": "both", "coordinator_layers": 2}),
        ("bert", {"head_gates": True, "coordinator": "none"}),
        ("vit", {"head_gates": True}),
        ("qwen3_moe", {"expert_gates": True}),
        ("mixture", {"expert_gates": True, "share_gates": True}),
        ("qwen3_moe", {"expert_gates": True, "head_gates": True, "coordinator": "none"}),
    ],
)
def test_chain_rule_of_gates_of_groups(family, options):
    assert_chain_rule(peft_model(family, "warm", targets=FAMILIES[family].linear), family, **options)


@pytest.mark.parametrize("regularizer", ["none", "laplacian"])
def test_chain_rule_with_clipping(regularizer):
    assert_chain_rule(
        peft_model("llama", "warm"), "llama", clip=0.01, tolerance=2e-5, regularizer=regularizer
    )


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
def test_saved_adapter_is_plain_peft(family, init, tmp_path):
    model, optimizer, runtime = attached(
        peft_model(family, init, targets=FAMILIES[family].linear), semantic_every=2
    )
    train(model, family, optimizer, steps=4)
    trained = logits_of(model, family)
    model.train()
    runtime.train()  # saved within a step: evaluation weights all the same
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(family), tmp_path)
    # PiSSA's base weights are recomputed by an SVD at load, which costs a few more digits.
    assert (logits_of(loaded, family) - trained).abs().max() <= (1e-5 if init == "pissa" else 1e-6)
    runtime.detach()
    assert (logits_of(model, family) - trained).abs().max() == 0
    assert (logits_of(model.merge_and_unload(), family) - trained).abs().max() <= 1e-5
