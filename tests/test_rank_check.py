"""What is said where ranks differ: the one thing that does, and nothing of all that agrees."""

from __future__ import annotations

import pytest
import torch

from structlora_trl import StructLoRAConfig, StructLoRAError, rank_check

DIFFERENCES = {
    # facts of rank 1 where rank 0 has the defaults: words that are said
    "option": (
        {"configuration": {**StructLoRAConfig().options(), "beta": 0.5}},
        "configuration: beta",
    ),
    "version": ({"versions": {"torch": "2"}}, "versions: torch"),
    "engine": ({"engine": "FSDP2"}, "engine"),
    "modules": ({"modules": {"q_proj": [["a"], [1]], "v_proj": [["b"], [1]]}}, "modules: v_proj"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_what_differs_is_named_alone(name, monkeypatch):
    theirs, words = DIFFERENCES[name]
    facts = {
        "configuration": StructLoRAConfig().options(),
        "engine": "DDP",
        "modules": {"q_proj": [["a"], [1]]},
        "versions": {"torch": "1"},
    }
    sent = []

    def gather(everyone, own):
        sent.append(own)
        everyone[:] = sent

    # Two ranks, one after the other; the second gathers what both have sent.
    monkeypatch.setattr(rank_check.dist, "all_reduce", lambda extremes, how: extremes.fill_(1))
    monkeypatch.setattr(rank_check.dist, "all_gather_object", gather)
    monkeypatch.setattr(rank_check, "world_size", lambda: 2)
    with pytest.raises(StructLoRAError):
        rank_check.refuse_disagreement(facts, torch.device("cpu"))
    with pytest.raises(StructLoRAError) as raised:
        rank_check.refuse_disagreement({**facts, **theirs}, torch.device("cpu"))
    said = raised.value.found
    assert f"ranks that differ in {words} (" in said and "rank 1 has" in said and len(said) < 150
