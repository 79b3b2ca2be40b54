"""Attention heads are found where attention modules tell of them, in every family."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model

from structlora_trl.core.heads import heads_of
from structlora_trl.core.kinds import Heads, discover
from tests.support.setups import gpt2, t5
from tests.support.tiny import FAMILIES, base_model


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
