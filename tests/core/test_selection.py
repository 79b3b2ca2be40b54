"""Hard selection while training: what is kept, that the rest stays closed, and that a run goes on as it was."""

from __future__ import annotations

import re

import pytest
import torch

from structlora_trl import StructLoRAConfig, StructLoRAError, attach
from structlora_trl.attachment import build_runtime, refuse_unreachable
from structlora_trl.core.gates import nats, openness
from tests.support.tiny import (
    DATA,
    FAMILIES,
    adamw,
    assert_same,
    latents_of,
    lora_parameters,
    peft_model,
    standing,
    train,
)

CUT, LAST = 12, 15  # directions are selected at CUT
OPTIONS = {"keep": 0.25, "select_at": CUT}
_COUNTED = re.compile(r"\.lora_B\.")


def started(family="llama", optimizer=adamw, init="fresh", **options):
    model = peft_model(family, init, targets=FAMILIES[family].linear)
    optimizer = optimizer(model)
    return model, optimizer, attach(model, optimizer, **{**OPTIONS, **options}, **DATA)


def directions(model) -> dict[str, torch.Tensor]:
    """Module -> which columns of its lora_B are not zero."""
    named = lora_parameters(model).items()
    return {n: (p != 0).view(-1, p.shape[-1]).any(0) for n, p in named if _COUNTED.search(n)}


@pytest.mark.parametrize("keep", [0.25, "60%"])
def test_the_most_open_directions_are_kept(keep, caplog):
    model, optimizer, runtime = started(coordinator="none", keep=keep, gate_lr=5)
    train(model, "llama", optimizer, CUT - 1)
    assert all(kept.all() for kept in directions(model).values())
    train(model, "llama", optimizer, 1, first=CUT - 1)
    logits = runtime.state_dict()
    names = list(directions(model))
    kept = torch.cat([directions(model)[name] for name in names])
    logits = torch.cat([logits[f"/gates/{name.split('.lora_B')[0]}"] for name in names])
    assert logits[kept].min() >= logits[~kept].max() and logits.std() > 0.1
    passed = nats(logits).double()
    if keep == 0.25:
        assert int(kept.sum()) == round(0.25 * len(kept))
    else:  # the fewest that carry this share
        assert passed[kept].sum() >= 0.6 * passed.sum() > passed[kept].sum() - passed[kept].min()
    share = 100 * passed[kept].sum() / passed.sum()
    said = f"keeps {int(kept.sum())} of {len(kept)} directions from step {CUT} on, with {share:.1f} % of the nats"
    assert said in caplog.text and "structlora export" in caplog.text
    opened = torch.cat(list(runtime.openness().values()))
    expected = openness(logits[kept]).sort().values
    torch.testing.assert_close(opened[opened > 0].sort().values, expected)


def test_what_has_no_gate_is_kept():
    """Modules that fused kernels compute: nothing tells what their directions are worth."""
    model = peft_model(targets=["q_proj", "v_proj"])
    model.base_model.model.model.layers[1].self_attn.apply_qkv = fused = lambda x: x
    fused.__module__ = "unsloth.kernels.fast_lora"
    optimizer = adamw(model)
    runtime = attach(model, optimizer, **OPTIONS, **DATA)
    train(model, "llama", optimizer, CUT)
    assert (count := runtime.quiet["fused LoRA kernels"]) == 2
    ungated = [n for n in directions(model) if n.split(".lora_B")[0] not in runtime.openness()]
    assert len(ungated) == count
    for name, kept in directions(model).items():
        assert name not in ungated or kept.all()


@pytest.mark.parametrize(
    "family, init, options",
    [
        ("llama", "warm", {"side": "both", "coordinator_layers": 2}),
        ("llama", "warm", {"coordinator": "gat"}),
        ("llama", "warm", {"gates": "gumbel"}),
        ("qwen3_moe", "warm", {}),
        ("mixture", "warm", {}),
        ("llama", "warm", {"keep": "90%"}),
    ],
    ids=str,
)
def test_closed_stays_closed(family, init, options):
    """Whatever messages arrive, and no optimizer without momentum moves what is closed."""

    def sgd(model):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)

    model, optimizer, runtime = started(family, sgd, init, coordinator_lr=0.3, **options)
    train(model, family, optimizer, CUT)
    kept = [m.kept.clone() for m in runtime.maps]
    before = [f.B.clone() for f in latents_of(runtime)]
    assert 0 < sum(int(k.sum()) for k in kept) < sum(k.numel() for k in kept)
    for step in range(CUT, LAST):
        train(model, family, optimizer, 1, first=step)
        for factors, k in zip(standing(runtime), kept, strict=True):
            assert not (factors.B != 0).any(1)[~k].any()
    for now, then, m, k in zip(latents_of(runtime), before, runtime.maps, kept, strict=True):
        assert torch.equal(m.kept, k)
        moved = (now.B != then).any(1)
        assert not moved[~k].any()
        assert moved[k].any() or not k.any()


def test_what_other_code_writes_into_closed_directions_is_closed_in_the_next_step():
    model, optimizer, _ = started()
    train(model, "llama", optimizer, CUT)
    kept = directions(model)
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p.add_(0.1)
    train(model, "llama", optimizer, LAST - CUT, CUT)
    assert_same(kept, directions(model))


# Steps of a run, its options -> what is wrong, and the remedy; None where it can be made
OF_A_RUN = {
    "of a loop whose length is not known": (None, {"select_at": 0.5}, "length is not known.*`select_at=100`"),
    "at the end": (300, {"select_at": 300}, "step 300 of a run of 300 steps.*lower `select_at`"),
    "too early a share": (300, {"select_at": 0.001}, "step 0 of a run of 300 steps.*or raise `select_at`"),
    "a short run": (1, {}, "step 0 of a run of 1 steps.*train for more steps"),
    "the last but one": (300, {"select_at": 299}, None),
}


@pytest.mark.parametrize("case", OF_A_RUN)
def test_a_selection_is_within_the_run(case):
    steps, options, named = OF_A_RUN[case]
    model, config = peft_model(), StructLoRAConfig(keep=0.25, **options)

    def build():
        runtime = build_runtime(model, adamw(model), config, steps=steps, data=tuple(DATA.values()))
        refuse_unreachable(config, runtime.select_step, steps)
        return runtime.select_step

    if named is None:
        assert build() == config.select_at
        return
    with pytest.raises(StructLoRAError, match=named):
        build()


def test_a_run_that_ends_before_its_selection_says_so(caplog):
    model, optimizer, runtime = started()
    train(model, "llama", optimizer, CUT - 1)
    runtime.detach()
    assert "closed no direction" in caplog.text


def test_modules_without_any_direction_have_no_effective_rank():
    model, optimizer, runtime = started(keep=0.05)
    train(model, "llama", optimizer, CUT)
    assert any(not m.kept.any(-1).all() for m in runtime.maps)
    assert runtime.metrics()["structlora/effective_rank"] >= 1
