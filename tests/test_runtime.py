"""A step and what stands between steps, in bare PyTorch loops: roles, skipped steps, mixed precision, schedule, resuming."""

from __future__ import annotations

import copy

import pytest
import torch

from structlora_trl import StructLoRAError, attach
from tests.support.loops import HALF
from tests.support.promises import assert_same_run
from tests.support.setups import WHOLE, Setup, family
from tests.support.tiny import (
    FAMILIES,
    adamw,
    assert_same,
    attached,
    differing,
    evaluation_factors,
    logits_of,
    lora_parameters,
    loss_of,
    peft_model,
    tensors_of,
    train,
    weights_of,
)


def test_training_sees_noise_and_evaluation_does_not():
    model, optimizer, runtime = attached()
    train(model, "llama", optimizer, 2)
    evaluation = logits_of(model, "llama")
    assert torch.equal(evaluation, logits_of(model, "llama"))
    model.train()
    first = loss_of(model, "llama", 5)
    assert torch.equal(first, loss_of(model, "llama", 5))  # one draw for all micro-batches of a step
    between = logits_of(model, "llama")  # an evaluation during accumulation
    assert torch.equal(between, evaluation)
    assert torch.equal(first, loss_of(model, "llama", 5))
    runtime.eval()
    model.eval()
    assert not torch.equal(first, loss_of(model, "llama", 5))


def test_autograd_sees_the_weights_change():
    """Caches by version (Axolotl's DoRA kernel) are refreshed, and no backward goes through weights that are gone."""
    model, optimizer, runtime = attached()
    train(model, "llama", optimizer, 2)
    for flip in (runtime.train, runtime.eval):
        before = [(p, p._version, p.detach().clone()) for p in runtime.lora_parameters()]
        flip()
        changed = [p._version > version for p, version, value in before if not torch.equal(p, value)]
        assert all(changed) and len(changed) == len(before) / 2  # lora_B, on which the noise acts
    model.train()
    loss = loss_of(model, "llama", 5)
    runtime.eval()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_step_on_the_wrong_weights_is_refused():
    model, optimizer, runtime = attached()
    model.eval()
    loss_of(model, "llama", 0).backward()
    with pytest.raises(StructLoRAError, match="evaluation weights.*call `model.train\\(\\)`"):
        optimizer.step()
    assert runtime.step == 0


def dropout_off_one_by_one(model):
    """The remedy of that error."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()


def test_its_remedy_trains_without_dropout():
    model, optimizer, runtime = attached(peft_model(dropout=0.5))
    dropout_off_one_by_one(model)
    losses = [loss_of(model, "llama", 0) for _ in range(2)]
    assert torch.equal(*losses)
    losses[0].backward()
    optimizer.step()
    assert runtime.step == 1


def test_optimizers_that_evaluate_within_a_step_are_refused():
    model, optimizer, runtime = attached(
        optimizer=lambda model: torch.optim.LBFGS(lora_parameters(model).values(), lr=0.1)
    )
    before = weights_of(model)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, "llama", 0)
        loss.backward()
        return loss

    with pytest.raises(StructLoRAError, match="LBFGS, which evaluates its closure during a step.*AdamW"):
        optimizer.step(closure)
    runtime.eval()
    assert_same(before, weights_of(model))


@pytest.mark.parametrize("what", ["NaN", "no backward"])
def test_a_closure_may_leave_a_step_out(what):
    """As Lightning does where `training_step` returns None."""
    model, optimizer, runtime = attached()

    def closure(index):
        optimizer.zero_grad()
        loss = loss_of(model, "llama", index)
        if index == 1 and what == "no backward":
            return None
        (loss * float("nan") if index == 1 else loss).backward()
        return loss

    for index in range(3):
        before = weights_of(model)
        optimizer.step(lambda index=index: closure(index))
        model.eval()
        model(**FAMILIES["llama"].batch(9))
        assert (not differing(before, weights_of(model))) == (index == 1)
        model.train()
    assert (runtime.step, runtime.skipped_steps) == (2, int(what == "NaN"))


class Twice(torch.optim.AdamW):
    """Its step calls its parent's, which torch has hooked as soon as there was one AdamW (as PEFT's Riemannian one)."""

    def step(self, closure=None):
        return super().step(closure)


def test_a_step_within_a_step_is_one_step():
    def run(kind):
        model, optimizer, runtime = attached(
            optimizer=lambda model: kind(lora_parameters(model).values(), lr=1e-2)
        )
        train(model, "llama", optimizer, 3)
        return tensors_of(runtime)

    expected = run(torch.optim.AdamW)
    assert getattr(torch.optim.AdamW.step, "hooked", False)
    assert_same(run(Twice), expected)


def test_maximize_is_minimizing_the_negative():
    def run(maximize: bool):
        model, optimizer, runtime = attached(
            optimizer=lambda model: torch.optim.SGD(
                lora_parameters(model).values(), lr=0.5, maximize=maximize
            ),
            regularizer="laplacian",
        )
        model.train()
        for seed in range(4):
            (loss_of(model, "llama", seed) * (-1 if maximize else 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return tensors_of(runtime)

    up, down = run(True), run(False)
    for name in down:
        if "graph.mean" in name:
            continue  # directions, compared by their cosines alone
        torch.testing.assert_close(up[name], down[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("first", ["attach", "compile"])
def test_compiled_models_train_as_others_and_no_step_recompiles(first):
    counts = torch._dynamo.utils.counters

    def run(compiled: bool):
        model = peft_model()
        optimizer = adamw(model)
        called = torch.compile(model, backend="aot_eager") if compiled and first == "compile" else model
        runtime = attach(called, optimizer)
        if compiled and first == "attach":
            called = torch.compile(model, backend="aot_eager")
        graphs = []
        for seed in range(3):
            train(called, "llama", optimizer, 1, first=seed)
            logits = logits_of(called, "llama")
            graphs.append(counts["stats"]["unique_graphs"])
        return runtime, logits, graphs

    torch._dynamo.reset()
    counts.clear()
    runtime, logits, graphs = run(True)
    assert runtime.step == 3 and graphs[0] > 0 and len(set(graphs)) == 1 and not counts["graph_break"]
    torch.testing.assert_close(logits, run(False)[1], rtol=1e-4, atol=1e-5)


def test_freezing_for_a_while_leaves_the_latents():
    model, optimizer, runtime = attached()
    train(model, "llama", optimizer, 5)
    latents = [latent.B.clone() for latent in runtime.engine.read_latents()]
    frozen = [p for n, p in model.named_parameters() if "lora_B" in n]
    for step in range(3):
        for parameter in frozen:
            parameter.requires_grad_(False)
        train(model, "llama", optimizer, 1, first=step)
        for parameter in frozen:
            parameter.requires_grad_(True)
        loss_of(model, "llama", 1)
        logits_of(model, "llama")
    assert runtime.step == 8
    assert all(
        torch.equal(before, now.B) for before, now in zip(latents, runtime.engine.read_latents(), strict=True)
    )


def test_unfreezing_is_refused():
    model = peft_model()
    optimizer = torch.optim.AdamW(p for n, p in model.named_parameters() if "lora" in n)
    late = [p for n, p in model.named_parameters() if "lora" in n and "layers.2" in n]
    for parameter in late:
        parameter.requires_grad_(False)
    runtime = attach(model, optimizer)
    train(model, "llama", optimizer, 1)
    for parameter in late:
        parameter.requires_grad_(True)
    with pytest.raises(StructLoRAError, match="4 LoRA parameters that were frozen.*attach again"):
        train(model, "llama", optimizer, 1)
    runtime.detach()  # the remedy
    optimizer.zero_grad()
    runtime = attach(model, optimizer)
    train(model, "llama", optimizer, 1)
    assert runtime.step == 1 and {kind.depth_count for kind in runtime.kinds} == {3}


def test_training_of_another_adapter_leaves_the_state():
    """Plain LoRA's own loop: PEFT turns `requires_grad` off and on meanwhile."""
    model, _, _ = attached()
    model.add_adapter("other", model.peft_config["default"])
    optimizer = torch.optim.AdamW(p for n, p in model.named_parameters() if "lora" in n)
    runtime = attach(model, optimizer)
    train(model, "llama", optimizer, 3)
    assert runtime.step == 3
    before = tensors_of(runtime)
    model.set_adapter("other")
    train(model, "llama", optimizer, 2)
    assert_same(before, tensors_of(runtime))
    model.set_adapter("default")
    train(model, "llama", optimizer, 1)
    assert runtime.step == 4


def test_step_without_backward_changes_nothing():
    model, optimizer, runtime = attached()
    train(model, "llama", optimizer, 2)
    before, weights = tensors_of(runtime), weights_of(model)
    optimizer.step()
    assert_same(before, tensors_of(runtime))
    assert_same(weights, weights_of(model))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_bad_gradients_skip_the_step_and_are_counted(poison):
    model, optimizer, runtime = attached(peft_model(targets=FAMILIES["llama"].linear))
    train(model, "llama", optimizer, 2)
    before, weights = tensors_of(runtime), weights_of(model)
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    loss_of(model, "llama", 5).backward()
    next(p for n, p in lora_parameters(model).items() if "v_proj" in n).grad[0, 0] = poison
    optimizer.step()
    optimizer.zero_grad()
    assert runtime.skipped_steps == 1
    assert_same(before, tensors_of(runtime))
    assert_same(weights, weights_of(model))
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[index][name]) for name, value in state.items())
    assert runtime.metrics()["structlora/skipped_steps"] == 1
    train(model, "llama", optimizer, 1)
    assert runtime.step == 3 and all(w.isfinite().all() for w in weights_of(model).values())


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused):
    """Scaled gradients train as unscaled ones, and a step that GradScaler skips changes nothing.

    Fused optimizers unscale inside their step; the others are not stepped at all after an overflow.
    """

    def run(scaled: bool):
        model = peft_model(targets=FAMILIES["llama"].linear)
        optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=1e-2, fused=fused)
        runtime = attach(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        states = []
        for seed, overflow in enumerate([False, True, False]):
            if overflow and not scaled:
                continue
            scaler.scale(loss_of(model, "llama", seed)).backward()
            if overflow:
                next(iter(lora_parameters(model).values())).grad.fill_(float("inf"))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            runtime.eval()
            states.append((tensors_of(runtime), weights_of(model)))
        return runtime, states

    runtime, states = run(scaled=True)
    assert runtime.step == 2
    assert_same(states[1][0], states[0][0])
    assert_same(states[1][1], states[0][1])
    _, plain = run(scaled=False)
    final, expected = states[-1][0], plain[-1][0]
    for name in final:
        if name.endswith(("latent_A", "latent_B", "logits", "theta")):
            torch.testing.assert_close(final[name], expected[name], rtol=1e-3, atol=1e-4)


def test_noise_and_alignment_are_told_by_the_seed():
    def logits(**options):
        model, _, _ = attached(peft_model(init="warm"), **options)
        model.train()
        return loss_of(model, "llama", 0)

    assert torch.equal(logits(seed=1), logits(seed=1))
    assert not torch.equal(logits(seed=1), logits(seed=2))


@pytest.mark.parametrize(
    "init, options, aligned",
    [
        ("fresh", {}, True),
        ("fresh", {"align_init": False}, False),
        ("fresh", {"coordinator": "none"}, False),
        ("fresh", {"coordinator": "none", "regularizer": "cosine"}, True),
        ("warm", {}, False),
        ("pissa", {}, False),
    ],
)
def test_a_fresh_adapter_starts_with_one_A_per_kind(init, options, aligned):
    _, _, runtime = attached(peft_model(init=init), **options)
    for kind in runtime.kinds:
        assert all(torch.equal(kind.A[0], a) for a in kind.A[1:]) is aligned


def test_a_kind_without_gradients_rests_in_that_step():
    """As plain LoRA does, whose AdamW passes over what has none: here a tower that a batch of text does not use."""
    targets = [*FAMILIES["llava"].attention, "linear_1"]
    model, optimizer, runtime = attached(peft_model("llava", "warm", targets=targets))
    for step in range(2):
        train(model, "llava", optimizer, 1, first=step)
    before = runtime.engine.read_latents(everything=True)
    train(model, "llama", optimizer, 2)
    moved = {
        m.kind.name: any(not torch.equal(a, b) for a, b in zip(then, now, strict=True))
        for m, then, now in zip(
            runtime.maps, before, runtime.engine.read_latents(everything=True), strict=True
        )
    }
    assert moved == {name: "language" in name for name in moved} and len({*moved.values()}) == 2


def test_a_kind_without_directions_is_no_fresh_adapter():
    """Selection, or pruning, leaves kinds whose lora_B is zero: what stands in their lora_A was trained."""
    model = peft_model(init="warm")
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            if "q_proj" in name and "lora_B" in name:
                parameter.zero_()
    before = weights_of(model)
    _, _, runtime = attached(model)
    assert_same(before, weights_of(model))
    assert not runtime.has_aligned


@pytest.mark.parametrize("options", [{}, {"coordinator": "none"}])
def test_gradients_are_compared_once_for_each_report(options):
    def reported(*counts: int) -> list[float]:
        model, optimizer, runtime = attached(**options)
        assert "structlora/gradient_cosine" not in runtime.metrics()  # no step yet
        found, done = [], 0
        for count in counts:
            train(model, "llama", optimizer, count, first=done)
            done += count
            found.append(runtime.metrics()["structlora/gradient_cosine"])
        return found

    each = reported(2, 1, 1, 1)  # the first step's gradients of lora_A are zero
    assert len(set(each)) == 4 and all(each)
    assert reported(2, 2) == pytest.approx([each[0], each[1]], rel=1e-4)


def test_semantic_edges_come_on_time():
    model, optimizer, runtime = attached(semantic_every=3, semantic_threshold=-0.99, semantic_top_k=1)
    counts = []
    for seed in range(3):
        train(model, "llama", optimizer, 1, first=seed)
        counts.append(sum(m.graph.semantic_edge_count for m in runtime.maps))
    assert counts[:2] == [0, 0] and counts[2] > 0
    assert runtime.metrics()["structlora/semantic_edges"] == counts[2]


@pytest.mark.parametrize(
    "options",
    [
        {"coordinator": "gat", "side": "both"},
        {"filter": "random"},
        {"filter": "topk_norm", "regularizer": "cosine"},
        {"keep": 0.25, "select_at": HALF + 1},  # saved while it gathers
    ],
    ids=str,
)
def test_resume_is_bit_for_bit(options, tmp_path):
    """The method's other parts; of the default ones, each set-up's own run resumes (`test_setups.py`)."""
    row = Setup("", **family("llama"), method={**WHOLE, **options})
    run = row.loop.run(row, tmp_path, row.method)
    assert_same_run(row.loop.run(row, tmp_path, row.method, resume=True), run)


def test_detach_leaves_plain_lora():
    model, optimizer, runtime = attached()
    train(model, "llama", optimizer, 2)
    runtime.train()
    runtime.detach()
    for kind, factors in zip(runtime.kinds, evaluation_factors(runtime), strict=True):
        assert torch.equal(torch.stack(list(kind.A)), factors.A) and torch.equal(
            torch.stack(list(kind.B)), factors.B
        )
    calls = runtime.hook_calls
    train(model, "llama", optimizer, 1)
    assert runtime.hook_calls == calls


def test_a_broken_off_run_is_taken_over():
    model, optimizer, runtime = attached(peft_model(init="warm"))
    train(model, "llama", optimizer, 2)
    evaluation = logits_of(model, "llama")
    model.train()
    loss_of(model, "llama", 0)  # training weights stand, and the run ends here
    again = attach(model, adamw(model))
    assert not runtime.is_attached
    assert torch.equal(logits_of(model, "llama"), evaluation)
    again.detach()


def test_copies_of_the_model_do_not_carry_the_runtime():
    model, optimizer, runtime = attached()
    train(model, "llama", optimizer, 1)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in lora_parameters(twin).values():
            parameter.fill_(0.5)
    runtime.train()
    assert all((v == 0.5).all() for n, v in twin.state_dict().items() if "lora" in n)
    twin.train()
    loss_of(twin, "llama", 0)
    assert all((p == 0.5).all() for p in lora_parameters(twin).values())


def test_unused_depths_get_gradients_from_neighbours_alone():
    """A module that the batch did not reach has no gradient: gates leave it alone, a coordinator may reach it."""
    for options, moves in (({"coordinator": "none"}, False), ({"coordinator": "gcn", "side": "write"}, True)):
        model, optimizer, runtime = attached(peft_model(init="warm"), **options)
        train(model, "llama", optimizer, 2)
        kind = runtime.kinds[0]
        before = runtime.engine.read_latents()[0].B[1].clone()
        model.train()
        loss_of(model, "llama", 7).backward()
        kind.A[1].grad = kind.B[1].grad = None
        optimizer.step()
        assert (not torch.equal(before, runtime.engine.read_latents()[0].B[1])) is moves


@pytest.mark.parametrize("rank", [4, 4096])
def test_the_kl_moves_gates_by_their_rate_however_many_there_are(rank):
    """AdamW's first step is the rate, unless epsilon outweighs a gradient that a mean over many gates has made small."""
    model = peft_model(rank=rank)
    optimizer = adamw(model)
    runtime = attach(model, optimizer, label_weight=0.0, gate_lr=0.03, coordinator="none")
    before = torch.cat([m.filter.logits.detach().flatten() for m in runtime.maps])
    train(model, "llama", optimizer, 1)
    moved = before - torch.cat([m.filter.logits.detach().flatten() for m in runtime.maps])
    torch.testing.assert_close(moved, torch.full_like(moved, 0.03), rtol=1e-3, atol=0)


@pytest.mark.parametrize("call", ["train", "reload", "load_state_dict"])
def test_a_detached_runtime_writes_nothing(call):
    model, optimizer, runtime = attached()
    train(model, "llama", optimizer, 2)
    runtime.detach()
    state, weights = runtime.state_dict(), weights_of(model)
    with pytest.raises(StructLoRAError, match="detached"):
        getattr(runtime, call)(*([state] if call == "load_state_dict" else []))
    assert_same(weights, weights_of(model))
    assert_same(runtime.state_dict(), state)
