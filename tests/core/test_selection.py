"""Hard selection while training: what is kept, that the rest stays closed, and that a run goes on as it was."""

from __future__ import annotations

import re

import pytest
import torch

from structlora_trl import StructLoRAConfig, StructLoRAError, attach
from structlora_trl.attachment import build_runtime, refuse_unreachable
from structlora_trl.core.selection import LEAST_STEPS
from tests.support.core import kind_map
from tests.support.tiny import (
    FAMILIES,
    adamw,
    assert_same,
    lora_parameters,
    loss_of,
    peft_model,
    standing,
    train,
)

CUT, LAST = 12, 15  # gathers over the ten steps before CUT, and selects there
OPTIONS = {"keep": 0.25, "select_at": CUT}
_COUNTED = re.compile(r"\.(lora_B|vera_lambda_d)\.")


def started(family="llama", optimizer=adamw, init="fresh", **options):
    model = peft_model(family, init, targets=FAMILIES[family].linear)
    optimizer = optimizer(model)
    return model, optimizer, attach(model, optimizer, **{**OPTIONS, **options})


def directions(model) -> dict[str, torch.Tensor]:
    """Module -> which columns of its lora_B, or entries of its λ_d, are not zero."""
    named = lora_parameters(model).items()
    return {n: (p != 0).view(-1, p.shape[-1]).any(0) for n, p in named if _COUNTED.search(n)}


@pytest.mark.parametrize("init", ["fresh", "vera"])
def test_the_directions_of_most_information_are_kept(init):
    """Σd² by what stands in plain sight before a step: gradients of the model's lora_B, and lora_B."""
    model, optimizer, runtime = started(init=init, coordinator="none")
    information = {}
    for step in range(CUT):
        model.train()
        loss_of(model, "llama", step).backward()
        for name, p in lora_parameters(model).items():
            if _COUNTED.search(name) and step >= CUT - 10:
                of_step = (p.grad * p).view(-1, p.shape[-1]).sum(0).square().detach()
                information[name] = information.get(name, 0) + of_step
        assert all(kept.all() for kept in directions(model).values()) or step == 0
        optimizer.step()
        optimizer.zero_grad()
    kept = torch.cat(list(directions(model).values()))
    scores = torch.cat([information[name] for name in directions(model)])
    assert int(kept.sum()) == round(0.25 * len(kept))
    assert scores[kept].min() > scores[~kept].max()
    assert runtime.metrics()["structlora/kept_share"] == pytest.approx(0.25, abs=1 / len(kept))


@pytest.mark.parametrize(
    "family, init, options",
    [
        ("llama", "warm", {"side": "both", "coordinator_layers": 2}),
        ("llama", "vera", {"coordinator": "gat"}),
        ("llama", "warm", {"coordinator": "gat"}),
        ("llama", "warm", {"noise": "off"}),
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
    before = [f.B.clone() for f in runtime.engine.read_latents()]
    assert 0 < sum(int(k.sum()) for k in kept) < sum(k.numel() for k in kept)
    for step in range(CUT, LAST):
        train(model, family, optimizer, 1, first=step)
        for factors, k in zip(standing(runtime), kept, strict=True):
            assert not (factors.B != 0).any(1)[~k].any()
    for now, then, m, k in zip(runtime.engine.read_latents(), before, runtime.maps, kept, strict=True):
        assert torch.equal(m.kept, k)
        moved = (now.B != then).any(1)
        assert not moved[~k].any()
        assert moved[k].any() or not k.any()


@pytest.mark.parametrize("coordinator", ["gcn", "gat"])
def test_closed_directions_relay_no_messages(coordinator):
    """Round 1 reaches direction 1, and round 2 reads no other; it is closed everywhere, so that nothing arrives."""
    m, latent = kind_map(keep=0.5, coordinator=coordinator, coordinator_layers=2)
    (coordinator,) = m.coordinators.values()
    with torch.no_grad():
        coordinator.theta.zero_()
        coordinator.theta[0, 0, 1] = coordinator.theta[1, 1, 2] = 1.0
    arrived = [m(latent)]
    kept = torch.ones_like(m.selection.kept)
    kept[:, 1] = False
    m.selection.close(kept)
    arrived.append(m(latent))
    with torch.no_grad():
        coordinator.theta.zero_()
    nothing, open_ = m(latent), [0, 2]
    differences = [
        max(
            float((found.A - nothing.A)[:, open_].abs().max()),
            float((found.B - nothing.B)[..., open_].abs().max()),
        )
        for found in arrived
    ]
    assert differences[0] > 1e-3 and differences[1] == 0


def test_reload_keeps_what_is_closed_and_forgets_the_rest():
    model, optimizer, runtime = started()
    train(model, "llama", optimizer, CUT - 1)
    assert any(m.selection.information.any() for m in runtime.maps)
    runtime.reload()  # information was about weights that may be gone
    assert not any(m.selection.information.any() for m in runtime.maps)
    train(model, "llama", optimizer, LEAST_STEPS - 1, CUT - 1)
    assert not runtime.has_selected  # which waits for as much information as ever
    train(model, "llama", optimizer, 1, LAST)
    assert runtime.has_selected
    model, optimizer, runtime = started()
    train(model, "llama", optimizer, CUT)
    kept = directions(model)
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p.add_(0.1)
    runtime.reload()
    assert_same(kept, directions(model))
    train(model, "llama", optimizer, LAST - CUT, CUT)
    assert_same(kept, directions(model))


@pytest.mark.parametrize(
    "options, named",
    [
        ({"select_at": 0.5}, "a share of a run whose length is not known.*`select_at=100`"),
        ({"select_at": 9}, "step 9.*at least 10 steps.*train for more steps, or raise"),
    ],
)
def test_a_selection_that_cannot_be_made_is_refused(options, named):
    with pytest.raises(StructLoRAError, match=named):
        started(**options)


# Steps of a run, its options -> what is wrong, and the remedy; None where it can be made
OF_A_RUN = {
    "after the end": (300, {"select_at": 500}, "step 500 of a run of 300 steps.*lower `select_at`"),
    "at the end": (300, {"select_at": 300}, "step 300 of a run of 300 steps.*lower `select_at`"),
    "a share that is the end": (12, {"select_at": 0.99}, "step 12 of a run of 12 steps.*lower `select_at`"),
    "too early a share": (300, {"select_at": 0.01}, "step 3 of a run of 300 steps.*or raise `select_at`"),
    "a short run": (12, {}, "step 6 of a run of 12 steps.*train for more steps"),
    "no step to spare": (10, {"select_at": 10}, "step 10 of a run of 10 steps.*train for more steps"),
    "the last but one": (300, {"select_at": 299}, None),
}


@pytest.mark.parametrize("case", OF_A_RUN)
def test_a_selection_is_within_the_run(case):
    steps, options, named = OF_A_RUN[case]
    model = peft_model()
    config = StructLoRAConfig(keep=0.25, **options)
    step = build_runtime(model, adamw(model), config, steps=steps).plan.select_step
    if named is None:
        refuse_unreachable(config, step, steps)
        assert step == config.select_at
        return
    with pytest.raises(StructLoRAError, match=named):
        refuse_unreachable(config, step, steps)


def test_a_run_that_ends_before_its_selection_says_so(caplog):
    model, optimizer, runtime = started()
    train(model, "llama", optimizer, CUT - 1)
    runtime.detach()
    assert "closed no direction" in caplog.text


def test_a_selection_tells_its_size_and_the_command_that_uses_it(caplog):
    model, optimizer, _ = started()
    train(model, "llama", optimizer, CUT)
    kept = sum(int(k.sum()) for k in directions(model).values())
    assert re.search(
        rf"keeps {kept} of \d+ directions from step {CUT} on, with \d+\.\d % .*structlora export", caplog.text
    )


def test_closed_directions_join_no_depths(monkeypatch):
    """Semantic edges go by gradients, and what a closed direction would gain says nothing about two depths."""
    from structlora_trl.core.graph import DepthGraph

    monkeypatch.setattr(DepthGraph, "decay", 0.0)
    model, optimizer, runtime = started(side="write")
    train(model, "llama", optimizer, LAST)
    for m in runtime.maps:
        seen = m.graph.mean_B.abs().amax(1) > 0  # (N, r)
        assert torch.equal(seen, m.kept)


def test_modules_without_any_direction_have_no_effective_rank():
    model, optimizer, runtime = started(keep=0.05)
    train(model, "llama", optimizer, CUT)
    assert any(not m.kept.any(-1).all() for m in runtime.maps)
    assert runtime.metrics()["structlora/effective_rank"] >= 1


@pytest.mark.parametrize("keep, costs", [("25%", True), (0.25, False)])
def test_the_line_of_a_selection_tells_what_is_kept(keep, costs, caplog):
    model, optimizer, _ = started(keep=keep)
    train(model, "llama", optimizer, CUT)
    assert re.search(
        rf"keeps \d+ of \d+ directions from step {CUT} on, with \d+\.\d % of the information", caplog.text
    )
    assert ("below 90 %" in caplog.text) is costs
