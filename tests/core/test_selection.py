"""Hard selection while training: what is kept, that the rest stays closed, and that a run goes on as it was."""

from __future__ import annotations

import re

import pytest
import torch
from peft import PeftModel

from structlora_trl import StructLoRACallback, StructLoRAError, attach
from structlora_trl.adapters.export import export
from structlora_trl.adapters.load_adapter import read_saved
from structlora_trl.state import save_state
from tests.support.core import kind_map
from tests.support.jobs import sft
from tests.support.tiny import (
    FAMILIES,
    adamw,
    assert_same,
    base_model,
    evaluation_factors,
    lora_parameters,
    loss_of,
    peft_model,
    train,
)

FIRST, CUT, LAST = 2, 4, 7  # gathers from step FIRST on, selects at CUT
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
            if _COUNTED.search(name) and step >= FIRST:
                of_step = (p.grad * p).view(-1, p.shape[-1]).sum(0).square().detach()
                information[name] = information.get(name, 0) + of_step
        assert all(kept.all() for kept in directions(model).values()) or step == 0
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
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
        ("llama", "warm", {"coordinator": "gat", "head_gates": True}),
        ("llama", "warm", {"filter": "none"}),
        ("llama", "warm", {"regularizer": "laplacian", "regularizer_weight": 1.0}),
        ("llama", "warm", {"regularizer": "cosine", "regularizer_weight": 1.0}),
        ("llama", "warm", {"filter": "topk_norm", "gate_init": 0.5}),
        ("qwen3_moe", "warm", {"expert_gates": True}),
        ("mixture", "warm", {}),
        ("bert", "warm", {"select_by": "random", "select_at": 0}),
        ("llama", "warm", {"keep": "90%"}),
    ],
    ids=str,
)
def test_closed_stays_closed(family, init, options):
    """Whatever messages arrive: in training and at evaluation, and no optimizer without momentum moves what is closed."""

    def sgd(model):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)

    model, optimizer, runtime = started(family, sgd, init, coordinator_lr=0.3, **options)
    train(model, family, optimizer, CUT)
    kept = [m.selection.kept.clone() for m in runtime.maps]
    before = [f.B.clone() for f in runtime.engine.read_latents(everything=True)]
    assert 0 < sum(int(k.sum()) for k in kept) < sum(k.numel() for k in kept)
    for step in range(CUT, LAST):
        model.train()
        loss_of(model, family, step).backward()
        for factors, k in zip(runtime.engine.read_working(), kept, strict=True):
            assert not (factors.B != 0).any(1)[~k].any()
        optimizer.step()
        optimizer.zero_grad()
        for factors, k in zip(evaluation_factors(runtime), kept, strict=True):
            assert not (factors.B != 0).any(1)[~k].any()
    for now, then, m, k in zip(
        runtime.engine.read_latents(everything=True), before, runtime.maps, kept, strict=True
    ):
        assert torch.equal(m.selection.kept, k)
        moved = (now.B != then).any(1)
        assert not moved[~k].any()
        assert moved[k].any() or not k.any()


@pytest.mark.parametrize("coordinator", ["gcn", "gat"])
def test_closed_directions_relay_no_messages(coordinator):
    """Round 1 reaches direction 1, and round 2 reads no other; it is closed everywhere, so that nothing arrives."""
    m, latent = kind_map(keep=0.5, coordinator=coordinator, coordinator_layers=2, activation="identity")
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


def test_closed_gates_count_as_closed():
    model, optimizer, runtime = started(keep=0.6)
    train(model, "llama", optimizer, LAST)
    openness = torch.cat(
        [
            m.openness(f)[0].flatten()
            for m, f in zip(runtime.maps, runtime.engine.read_latents(everything=True), strict=True)
        ]
    )
    metrics = runtime.metrics()
    assert metrics["structlora/gate_openness"] == pytest.approx(openness.mean().item(), rel=1e-5)
    assert openness.mean() < metrics["structlora/kept_share"]


def test_what_is_saved_is_plain_and_exports_small(tmp_path):
    model, optimizer, runtime = started()
    train(model, "llama", optimizer, LAST)
    model.eval()
    model.save_pretrained(tmp_path / "run")
    save_state(runtime, tmp_path / "run")
    kept = sum(int(k.sum()) for k in directions(model).values())
    base_model("llama").save_pretrained(tmp_path / "base")
    export(read_saved(tmp_path / "run"), tmp_path / "small", prune_below=0.01, base=str(tmp_path / "base"))
    small = PeftModel.from_pretrained(base_model("llama"), tmp_path / "small", is_trainable=True)
    ranks = {n: p.shape[1] for n, p in lora_parameters(small).items() if ".lora_B." in n}
    empty = sum(not k.any() for k in directions(model).values())
    assert sum(ranks.values()) == kept + empty  # PEFT has no rank 0


def test_reload_keeps_what_is_closed():
    model, optimizer, runtime = started()
    train(model, "llama", optimizer, CUT)
    kept = directions(model)
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p.add_(0.1)
    runtime.reload()
    model.eval()
    assert_same(kept, directions(model))
    train(model, "llama", optimizer, LAST - CUT, CUT)
    assert_same(kept, directions(model))


def test_random_is_drawn_once_from_the_seed():
    def kept(seed):
        model, *_ = started(init="warm", select_by="random", select_at=0, seed=seed)
        return torch.cat(list(directions(model).values()))

    assert torch.equal(kept(1), kept(1)) and not torch.equal(kept(1), kept(2))
    assert int(kept(1).sum()) == round(0.25 * len(kept(1)))


def test_a_share_of_a_run_of_unknown_length_is_refused():
    with pytest.raises(StructLoRAError, match="select_at"):
        started(select_at=0.5)


def test_a_trainer_knows_the_length_of_its_run(tmp_path, capsys, caplog):
    callback = StructLoRACallback(keep=0.5)
    trainer = sft(tmp_path, [callback], max_steps=6, logging_steps=1)
    trainer.train()
    logged = [entry.get("structlora/kept_share") for entry in trainer.state.log_history if "loss" in entry]
    assert logged[:2] == [None, None] and logged[3:] == [pytest.approx(0.5)] * 3
    assert re.search(r"keep=0.5 from step (\d+)", capsys.readouterr().out)[1] == "3"
    assert "closed no direction" not in caplog.text
    with pytest.raises(StructLoRAError, match="keep"):
        callback.start_over(trainer, trainer.optimizer, reset=lambda: None)


def test_a_run_that_ends_before_its_selection_says_so(caplog):
    model, optimizer, runtime = started()
    train(model, "llama", optimizer, CUT - 1)
    runtime.detach()
    assert "closed no direction" in caplog.text


def test_closed_directions_join_no_depths():
    """Semantic edges go by gradients, and what a closed direction would gain says nothing about two depths."""
    model, optimizer, runtime = started(side="write", semantic_decay=0.0)
    train(model, "llama", optimizer, LAST)
    for m in runtime.maps:
        seen = m.graph.mean_B.abs().amax(1) > 0  # (N, r)
        assert torch.equal(seen, m.selection.kept)
