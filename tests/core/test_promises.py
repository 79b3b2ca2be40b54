"""The design's promise 2, the chain rule, on every model family. The others are in each row of set-ups (`tests/test_setups.py`)."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.support.chain_rule import assert_chain_rule
from tests.support.setups import quantised
from tests.support.tiny import FAMILIES, INITS, peft_model, warm_up

FP32, BF16 = torch.float32, torch.bfloat16

# family, init, all linear modules, dropout, dtype
CASES = [
    *(("llama", init, False, 0.0, FP32) for init in INITS),
    *((family, "warm", True, 0.1, FP32) for family in FAMILIES),
    *((family, "warm", False, 0.0, BF16) for family in ("llama", "mixtral", "mixture", "bert")),
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
    {"gates": "off"},
    {"gates": "gumbel"},
]


@pytest.mark.parametrize(
    "family, init", [("llama", "warm"), ("qwen3_moe", "warm"), ("mixture", "warm"), ("mixture", "vera")]
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_chain_rule_of_every_switch(options, family, init):
    assert_chain_rule(peft_model(family, init, targets=FAMILIES[family].linear), family, **options)


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
