"""Attention heads are found where attention modules tell of them, in every family."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model

from structlora_trl import StructLoRAError, attach
from structlora_trl.core.heads import heads_of
from structlora_trl.core.kinds import Heads, discover
from tests.support.setups import gpt2, t5
from tests.support.tiny import FAMILIES, adamw, base_model, peft_model


def heads(base, targets) -> dict[str, Heads | None]:
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets))
    return {kind.target.rsplit(".", 1)[-1]: heads_of(model, kind) for kind in discover(model, "default")}


def test_llama_with_fewer_heads_of_keys_and_values():
    base = base_model("llama")
    found = heads(base, FAMILIES["llama"].linear)
    queries, keys = base.config.num_attention_heads, base.config.num_key_value_heads
    assert keys < queries
    assert found == {
        **{"q_proj": Heads("B", queries), "k_proj": Heads("B", keys), "v_proj": Heads("B", keys)},
        **{"o_proj": Heads("A", queries), "gate_proj": None, "up_proj": None, "down_proj": None},
    }


@pytest.mark.parametrize(
    ("base", "targets", "expected"),
    [
        (lambda: base_model("bert"), ["query", "attention.output.dense"], {"query": "B", "dense": "A"}),
        (gpt2, ["c_attn"], {"c_attn": "B"}),
        (t5, ["q", "o"], {"q": "B", "o": "A"}),
    ],
)
def test_other_families(base, targets, expected):
    model = base()
    found = heads(model, targets)
    count = model.config.num_attention_heads * (3 if "c_attn" in targets else 1)  # of q, k and v
    assert found == {name: Heads(side, count) for name, side in expected.items()}


@pytest.mark.parametrize(
    ("options", "targets", "message"),
    [
        ({"head_gates": True}, ["down_proj"], "head_gates=True and no attention projection"),
        ({"expert_gates": True}, ["q_proj"], "expert_gates=True and no experts"),
        ({"head_gates": True, "filter": "random"}, ["q_proj"], "head_gates=True and filter='random'"),
    ],
)
def test_groups_that_are_not_there_are_refused(options, targets, message):
    model = peft_model("llama", targets=targets)
    with pytest.raises(StructLoRAError, match=message):
        attach(model, adamw(model), **options)


def test_heads_that_hold_base_weights_are_refused():
    model = get_peft_model(
        base_model("llama"), LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights="pissa")
    )
    with pytest.raises(StructLoRAError, match="holds part of the base weights"):
        attach(model, adamw(model), head_gates=True)
