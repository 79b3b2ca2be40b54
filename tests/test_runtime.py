"""A step and what stands between steps, in bare PyTorch loops: writes, broken steps, skipped steps, precision, resuming."""

from __future__ import annotations

import copy
import gc
import sys
import weakref

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from structlora_trl import StructLoRAError, attach
from structlora_trl.core.kinds import Kind
from tests.support.promises import assert_same_run
from tests.support.setups import WHOLE, Setup, family
from tests.support.tiny import (
    DATA,
    FAMILIES,
    adamw,
    assert_same,
    attached,
    differing,
    logits_of,
    lora_parameters,
    loss_of,
    peft_model,
    standing,
    step_with,
    tensors_of,
    train,
    trained,
    weights_of,
)


def backward(model):
    model.train()
    loss_of(model, "llama", 7).backward()


ACTS = {
    "backward": backward,
    "evaluation": lambda model: logits_of(model, "llama"),
    "generation": lambda model: model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False),
    "merging": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
}


@pytest.mark.parametrize("act", ACTS)
def test_nothing_but_a_step_changes_a_parameter(act, tmp_path):
    """What stands is the adapter: read it, save it at any moment."""
    model, _optimizer, _runtime = trained()
    before = weights_of(model)
    ACTS[act](model)
    assert_same(before, weights_of(model))
    model.save_pretrained(tmp_path)
    assert_same(load_file(tmp_path / "adapter_model.safetensors"), get_peft_model_state_dict(model))


def test_a_model_outlives_a_run_that_nobody_ended():
    """Its gates go with the runtime, so that a later run trains as it should."""
    model, optimizer, runtime = trained()
    left = weakref.ref(runtime)
    del optimizer, runtime
    gc.collect()
    assert left() is None
    model.train()
    assert torch.equal(loss_of(model, "llama", 5), loss_of(model, "llama", 5))


def interrupted_at(line: int, step) -> int:
    """Call a step, and raise KeyboardInterrupt at a line of the package in it. Return how many lines it ran."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if "structlora_trl" not in frame.f_code.co_filename:
            return None
        if event == "line":
            count += 1
            if count == line:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        step()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return count


def test_ctrl_c_at_any_line_of_a_step_leaves_an_adapter_that_goes_on():
    """What stands is the adapter before the step, after the optimizer's, or in part the one and the other."""
    model, optimizer, runtime = trained()
    backward(model)
    lines = interrupted_at(-1, optimizer.step)
    for line in range(1, lines, max(1, lines // 40)):
        optimizer.zero_grad()
        backward(model)
        before = weights_of(model)
        interrupted_at(line, optimizer.step)
        for name, value in weights_of(model).items():
            assert (value - before[name]).abs().max() < 0.05, f"{name}, line {line}"  # steps are of 0.01
    optimizer.zero_grad()
    done = runtime.step
    train(model, "llama", optimizer, 2)
    assert runtime.step == done + 2 and all(x.isfinite().all() for x in weights_of(model).values())


def test_two_steps_of_one_backward_carry_its_gradients_back_twice():
    """As plain LoRA uses them twice: what a backward left stands again after a step."""
    model, optimizer, runtime = attached(peft_model(init="warm"))
    backward(model)
    found = {name: p.grad.clone() for name, p in lora_parameters(model).items()}
    for step in (1, 2):
        optimizer.step()
        assert runtime.step == step
        assert_same(found, {name: p.grad for name, p in lora_parameters(model).items()})


def test_a_model_that_moves_is_refused(monkeypatch):
    model, optimizer, _runtime = attached()
    backward(model)
    monkeypatch.setattr(Kind, "device", torch.device("meta"))
    with pytest.raises(StructLoRAError, match="moved from cpu to meta.*then call `attach`"):
        optimizer.step()


def other_weights(model) -> dict:
    generator = torch.Generator().manual_seed(4)
    state = get_peft_model_state_dict(model)
    return {n: value + 0.02 * torch.randn(value.shape, generator=generator) for n, value in state.items()}


def by_new_storage(model, new):
    for name, value in new.items():
        model.get_parameter(name.replace(".weight", ".default.weight")).data = value.clone()


def by_negating(model, new):
    """The norm of each parameter stays."""
    for name in new:
        model.get_parameter(name.replace(".weight", ".default.weight")).data.neg_()


@pytest.mark.parametrize("write", [set_peft_model_state_dict, by_new_storage, by_negating])
def test_weights_that_other_code_writes_are_trained_on(write):
    """Latents move with them: an average that stays in, LocalSGD, weights that are loaded."""
    model, optimizer, runtime = trained()
    write(model, other_weights(model))
    written = weights_of(model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-6
    train(model, "llama", optimizer, 1)
    assert runtime.step == 4
    for name, value in weights_of(model).items():
        assert 0 < (value - written[name]).abs().max() < 2e-2, name


def test_another_optimizer_steps_as_in_plain_lora():
    model, optimizer, runtime = trained()
    other = torch.optim.SGD(lora_parameters(model).values(), lr=1e-2)
    before = weights_of(model)
    backward(model)
    expected = {name: before[name] - 1e-2 * p.grad for name, p in lora_parameters(model).items()}
    other.step()
    other.zero_grad()
    for name, value in weights_of(model).items():
        torch.testing.assert_close(value, expected[name])
    train(model, "llama", optimizer, 1)
    assert runtime.step == 4


@pytest.mark.parametrize("coordinator", ["gcn", "none"])
def test_an_optimizer_that_evaluates_within_a_step_serves_where_nothing_is_mapped(coordinator):
    model, optimizer, runtime = attached(
        optimizer=lambda model: torch.optim.LBFGS(lora_parameters(model).values(), lr=0.1, max_iter=3),
        gates="off",
        coordinator=coordinator,
    )
    losses = []

    def closure():
        optimizer.zero_grad()
        losses.append(loss_of(model, "llama", 0))
        losses[-1].backward()
        return losses[-1]

    if coordinator != "none":
        with pytest.raises(StructLoRAError, match="LBFGS, which evaluates its closure several times.*AdamW"):
            optimizer.step(closure)
        return
    optimizer.step(closure)
    assert len(losses) >= 3 and losses[-1] < losses[0] and runtime.step == 1


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


def test_maximize_is_minimizing_the_negative():
    def run(maximize: bool):
        model, optimizer, runtime = attached(
            optimizer=lambda model: torch.optim.SGD(
                lora_parameters(model).values(), lr=0.5, maximize=maximize
            ),
            gates="off",
        )
        model.train()
        for seed in range(4):
            (loss_of(model, "llama", seed) * (-1 if maximize else 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return tensors_of(runtime)

    up, down = run(True), run(False)
    for name in down:
        if "/mean_" in name:
            continue  # directions, compared by their cosines alone
        torch.testing.assert_close(up[name], down[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("first", ["attach", "compile"])
def test_compiled_models_train_as_others_and_no_step_recompiles(first):
    counts = torch._dynamo.utils.counters

    def run(compiled: bool):
        model = peft_model()
        optimizer = adamw(model)
        called = torch.compile(model, backend="aot_eager") if compiled and first == "compile" else model
        runtime = attach(called, optimizer, **DATA)
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


def test_autocast_keeps_no_cast_of_weights_that_are_gone():
    """An evaluation after a step, in one `with`: autocast reuses casts of weights until its end."""
    model, optimizer, _ = attached()
    with torch.autocast("cpu", torch.bfloat16):
        train(model, "llama", optimizer, 3)
        found = logits_of(model, "llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits_of(model, "llama"), found)


def test_unfreezing_is_refused():
    model = peft_model()
    optimizer = torch.optim.AdamW(p for n, p in model.named_parameters() if "lora" in n)
    late = [p for n, p in model.named_parameters() if "lora" in n and "layers.2" in n]
    for parameter in late:
        parameter.requires_grad_(False)
    runtime = attach(model, optimizer, **DATA)
    train(model, "llama", optimizer, 1)
    for parameter in late:
        parameter.requires_grad_(True)
    with pytest.raises(StructLoRAError, match="4 LoRA parameters that were frozen.*attach again"):
        train(model, "llama", optimizer, 1)
    runtime.detach()  # the remedy
    optimizer.zero_grad()
    runtime = attach(model, optimizer, **DATA)
    train(model, "llama", optimizer, 1)
    assert runtime.step == 1 and {kind.depth_count for kind in runtime.kinds} == {3}


def test_another_adapter_that_is_made_active_trains_as_plain_lora_and_leaves_the_state(caplog):
    """Plain LoRA's own loop: PEFT turns `requires_grad` off and on meanwhile. It is told once."""
    model, _, _ = attached()
    model.add_adapter("other", model.peft_config["default"])
    optimizer = torch.optim.AdamW(p for n, p in model.named_parameters() if "lora" in n)
    runtime = attach(model, optimizer, **DATA)
    train(model, "llama", optimizer, 3)
    assert runtime.step == 3
    before = tensors_of(runtime)
    assert "made active" not in caplog.text
    model.set_adapter("other")
    train(model, "llama", optimizer, 2)
    assert caplog.text.count("Adapter 'other' was made active") == 1
    assert_same(before, tensors_of(runtime))
    model.set_adapter("default")
    train(model, "llama", optimizer, 1)
    assert runtime.step == 4


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), None])
def test_bad_gradients_skip_the_step_and_are_counted(poison):
    """A step without a backward (None) changes nothing either."""
    model, optimizer, runtime = attached(peft_model(targets=FAMILIES["llama"].linear))
    train(model, "llama", optimizer, 2)
    before, weights = tensors_of(runtime), weights_of(model)
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    if poison is not None:
        loss_of(model, "llama", 5).backward()
        next(p for n, p in lora_parameters(model).items() if "v_proj" in n).grad[0, 0] = poison
    optimizer.step()
    optimizer.zero_grad()
    assert_same(before, tensors_of(runtime))
    assert_same(weights, weights_of(model))
    for index, state in optimizer.state_dict()["state"].items():
        assert_same(state, moments[index])
    assert runtime.metrics()["structlora/skipped_steps"] == (poison is not None)
    train(model, "llama", optimizer, 1)
    assert runtime.step == 3 and all(w.isfinite().all() for w in weights_of(model).values())


@pytest.mark.parametrize("fused, coordinator", [(False, "gcn"), (True, "gcn"), (True, "none")])
def test_an_overflow_under_grad_scaler_changes_nothing(fused, coordinator):
    """Fused optimizers unscale inside their step; the others are not stepped at all after an overflow. Scaled runs beside
    unscaled ones: `engines/test_attach.py`.
    """
    model = peft_model(targets=FAMILIES["llama"].linear)
    optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    runtime = attach(model, optimizer, coordinator=coordinator, scaler=scaler, **DATA)
    ends = []
    for overflows in (False, True, False):
        scaler.scale(loss_of(model, "llama", 0)).backward()
        if overflows:
            next(iter(lora_parameters(model).values())).grad.fill_(float("inf"))
        step_with(optimizer, scaler)
        optimizer.zero_grad()
        ends.append(tensors_of(runtime) | weights_of(model))
    assert (runtime.step, runtime.skipped_steps) == (2, int(fused))
    assert_same(ends[0], ends[1])
    assert differing(ends[1], ends[2])


def test_a_kind_without_gradients_rests_in_that_step():
    """As plain LoRA does, whose AdamW passes over what has none: here a tower that a batch of text does not use."""
    targets = [*FAMILIES["llava"].attention, "linear_1"]
    model, optimizer, runtime = attached(peft_model("llava", "warm", targets=targets))
    for step in range(2):
        train(model, "llava", optimizer, 1, first=step)
    before = standing(runtime)
    train(model, "llama", optimizer, 2)
    moved = {
        m.kind.name: any(not torch.equal(a, b) for a, b in zip(then, now, strict=True))
        for m, then, now in zip(runtime.maps, before, standing(runtime), strict=True)
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


@pytest.mark.parametrize(
    "options",
    [
        {"coordinator": "gat", "side": "both"},
        {"gates": "off"},
        {"gates": "gumbel", "coordinator": "none", "semantic_threshold": 0.5},
        {"keep": 0.25, "select_at": 10},  # saved before it selects
    ],
    ids=str,
)
def test_resume_is_bit_for_bit(options, tmp_path):
    """The method's other parts; of the default ones, each set-up's own run resumes (`test_setups.py`)."""
    row = Setup("", **family("llama"), method={**WHOLE, **options})
    run = row.loop.run(row, tmp_path, row.method)
    assert_same_run(row.loop.run(row, tmp_path, row.method, resume=True), run)


def test_detach_leaves_plain_lora_and_a_runtime_that_keeps_its_state():
    model, optimizer, runtime = trained()
    state, weights = runtime.state_dict(), weights_of(model)
    runtime.detach()
    assert_same(weights, weights_of(model))
    train(model, "llama", optimizer, 1)
    assert torch.equal(loss_of(model, "llama", 5), loss_of(model, "llama", 5))
    assert_same(state, runtime.state_dict())
    assert "structlora/effective_rank" in runtime.metrics()
    with pytest.raises(StructLoRAError, match="detached"):
        runtime.load_state_dict(state)
