"""A step and what stands between steps, in bare PyTorch loops: writes, broken steps, skipped steps, precision, resuming."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from structlora_trl import StructLoRAError, attach
from structlora_trl.core.graph import DepthGraph
from structlora_trl.core.kinds import Kind
from structlora_trl.core.mapping import Parts
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
    tensors_of,
    train,
    trained,
    weights_of,
)


def backward(model):
    model.train()
    loss_of(model, "llama", 7).backward()


def evaluate(model):
    logits_of(model, "llama")


def generate(model):
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)


def merge(model):
    model.merge_adapter()
    model.unmerge_adapter()


@pytest.mark.parametrize(
    "act", [backward, evaluate, generate, copy.deepcopy, merge, lambda m: m.state_dict()]
)
def test_nothing_but_a_step_changes_a_parameter(act, tmp_path):
    """What stands is the adapter: read it, copy it, save it at any moment."""
    model, _optimizer, runtime = trained()
    before, versions = weights_of(model), [p._version for p in runtime.lora_parameters()]
    act(model)
    assert_same(before, weights_of(model))
    assert versions == [p._version for p in runtime.lora_parameters()]
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


class Interrupted(Exception):
    pass


class Breaks(torch.optim.AdamW):
    """Writes half of a step, and breaks off."""

    breaks = False

    @torch.no_grad()
    def step(self, closure=None):
        if self.breaks:
            for group in self.param_groups:
                for parameter in group["params"][:5]:
                    parameter.add_(0.5)
            raise Interrupted
        return super().step(closure)


def test_a_step_that_breaks_off_leaves_what_plain_lora_leaves():
    """What the optimizer wrote, latents and all; and training goes on from it."""
    ends = []
    for attaches in (True, False):
        model = peft_model(targets=FAMILIES["llama"].linear, init="warm")
        optimizer = Breaks(lora_parameters(model).values(), lr=1e-2)
        runtime = attach(model, optimizer, align_init=False, **DATA) if attaches else None
        backward(model)
        optimizer.breaks = True
        with pytest.raises(Interrupted):
            optimizer.step()
        ends.append(weights_of(model))
        optimizer.breaks = False
        optimizer.zero_grad()
        if attaches:
            train(model, "llama", optimizer, 2)
            assert runtime.step == 2
    assert_same(*ends)


class Meanwhile(torch.optim.SGD):
    """Waits in its step for another thread, which steps a model of its own."""

    waits = False

    def step(self, closure=None):
        if self.waits:
            other = torch.nn.Linear(2, 2)
            other(torch.ones(1, 2)).sum().backward()
            thread = threading.Thread(target=torch.optim.SGD(other.parameters(), lr=0.1).step)
            thread.start()
            thread.join()
        return super().step(closure)


def test_gradients_of_a_step_that_broke_off_are_carried_back_once():
    """A step that is taken up without another backward is the step that broke off."""
    runs = []
    for breaks in (False, True):
        torch.manual_seed(0)
        model = peft_model(init="warm")
        optimizer = Breaks(lora_parameters(model).values(), lr=1e-2)
        runtime = attach(model, optimizer, gates="off", **DATA)
        train(model, "llama", optimizer, 3)
        backward(model)
        before = weights_of(model)
        optimizer.breaks = breaks
        if breaks:
            with pytest.raises(Interrupted):
                optimizer.step()
        optimizer.breaks = False
        model.load_state_dict(before, strict=False)
        optimizer.step()
        assert runtime.step == 4
        runs.append(weights_of(model))
    assert_same(*runs)


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


def test_a_selection_that_breaks_off_leaves_the_step_that_was_taken():
    class Breaking:
        def __call__(self, *_):
            raise Interrupted

    model = peft_model()
    optimizer = adamw(model)
    runtime = attach(model, optimizer, parts=Parts(choose=Breaking()), keep=0.5, select_at=10, **DATA)
    with pytest.raises(Interrupted):
        train(model, "llama", optimizer, 10)
    assert runtime.step == 10
    train(model, "llama", torch.optim.SGD(lora_parameters(model).values(), lr=1e-2), 1)


def test_a_model_that_moves_is_refused(monkeypatch):
    model, optimizer, _runtime = attached()
    backward(model)
    monkeypatch.setattr(Kind, "device", torch.device("meta"))
    with pytest.raises(StructLoRAError, match="moved from cpu to meta.*then call `attach`"):
        optimizer.step()


def test_sparse_gradients_beside_the_adapter():
    model, beside = peft_model(), torch.nn.Embedding(3, 2, sparse=True)
    optimizer = torch.optim.SGD([*lora_parameters(model).values(), *beside.parameters()], lr=1e-2)
    runtime = attach(model, optimizer, **DATA)
    before = beside.weight.detach().clone()
    backward(model)
    beside(torch.tensor([0, 0])).sum().backward()
    optimizer.step()
    assert runtime.step == 1 and (before != beside.weight).any(1).tolist() == [True, False, False]


def test_a_step_in_another_thread_leaves_this_one_alone():
    """As where a search has its trials in threads."""
    ends = []
    for waits in (False, True):
        torch.manual_seed(0)
        model, optimizer, runtime = attached(
            optimizer=lambda model: Meanwhile(lora_parameters(model).values(), lr=0.5), gates="off"
        )
        optimizer.waits = waits
        train(model, "llama", optimizer, 4)
        assert runtime.step == 4
        ends.append(weights_of(model))
    assert_same(*ends)


def other_weights(model) -> dict:
    generator = torch.Generator().manual_seed(4)
    state = get_peft_model_state_dict(model)
    return {n: value + 0.02 * torch.randn(value.shape, generator=generator) for n, value in state.items()}


def by_load_state_dict(model, new):
    model.load_state_dict({n.replace(".weight", ".default.weight"): v for n, v in new.items()}, strict=False)


def by_data(model, new):
    for name, value in new.items():
        model.get_parameter(name.replace(".weight", ".default.weight")).data.copy_(value)


def by_new_storage(model, new):
    for name, value in new.items():
        model.get_parameter(name.replace(".weight", ".default.weight")).data = value.clone()


def by_negating(model, new):
    """The norm of each parameter stays."""
    for name in new:
        model.get_parameter(name.replace(".weight", ".default.weight")).data.neg_()


@pytest.mark.parametrize(
    "write", [by_load_state_dict, set_peft_model_state_dict, by_data, by_new_storage, by_negating]
)
def test_weights_that_other_code_writes_are_trained_on(write):
    """Latents move with them: an average that stays in, LocalSGD, weights that are loaded."""
    model, optimizer, runtime = trained()
    offsets = [side.offset.clone() for side in runtime.sides]
    write(model, other_weights(model))
    written = weights_of(model)
    assert all(map(torch.equal, offsets, (side.offset for side in runtime.sides)))
    for group in optimizer.param_groups:
        group["lr"] = 1e-6
    train(model, "llama", optimizer, 1)
    assert runtime.step == 4
    for name, value in weights_of(model).items():
        assert 0 < (value - written[name]).abs().max() < 2e-2, name


def test_values_that_are_swapped_out_and_back_are_fine_whatever_their_dtypes():
    """In one dtype: SAM and moving averages among the set-ups."""
    model = peft_model(targets=FAMILIES["llama"].linear)
    for name, parameter in lora_parameters(model).items():
        parameter.data = parameter.data.bfloat16() if "layers.0." in name else parameter.data
    model, optimizer, runtime = attached(model)
    train(model, "llama", optimizer, 2)
    backward(model)
    with torch.no_grad():
        kept = [p.clone() for p in runtime.lora_parameters()]
        torch._foreach_mul_(runtime.lora_parameters(), 2.0)
        loss_of(model, "llama", 1)
        torch._foreach_copy_(runtime.lora_parameters(), kept)
    optimizer.step()
    assert runtime.step == 3


def test_without_a_coordinator_there_are_no_latents():
    """Any code may write: it is plain LoRA with gates."""
    model, optimizer, runtime = attached(coordinator="none")
    for step in range(3):
        train(model, "llama", optimizer, 1, first=step)
        by_data(model, other_weights(model))
    assert runtime.step == 3 and not runtime.sides


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


def test_an_optimizer_around_ours_steps_with_it():
    class Outer(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure=None):
            self.inner.step()

    model, optimizer, runtime = trained()
    outer = Outer(optimizer)
    for inner_first in (False, True):
        backward(model)
        outer.step() if not inner_first else optimizer.step()
        optimizer.zero_grad()
    assert runtime.step == 5


def test_training_without_gates_under_eval():
    """As without dropout: modules in `eval()` train."""
    model, optimizer, runtime = attached(peft_model(dropout=0.5))
    model.eval()
    losses = [loss_of(model, "llama", 0) for _ in range(2)]
    assert torch.equal(*losses)
    losses[0].backward()
    optimizer.step()
    assert runtime.step == 1


@pytest.mark.parametrize("evaluates_first", [False, True])
def test_a_gate_that_never_fires_is_an_error(evaluates_first):
    """Fused code computes lora_A's product without calling it."""
    model, optimizer, _runtime = attached()
    if evaluates_first:
        evaluate(model)
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    lora_A = layer.lora_A["default"]
    lora_A.__class__ = type("Fused", (torch.nn.Linear,), {"__call__": lambda self, x: x @ self.weight.T})
    backward(model)
    with pytest.raises(StructLoRAError, match="1 LoRA modules.*layers.0.*gates='off'"):
        optimizer.step()


class Evaluates(torch.optim.SGD):
    """Evaluates its closure a second time, at weights of its own."""

    def step(self, closure):
        closure()
        super().step()
        return closure()


def test_optimizers_that_evaluate_within_a_step_are_refused():
    model, optimizer, _ = attached(optimizer=lambda model: Evaluates(lora_parameters(model).values(), lr=0.1))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, "llama", 0)
        loss.backward()
        return loss

    with pytest.raises(StructLoRAError, match="Evaluates, which evaluates its closure several times.*AdamW"):
        optimizer.step(closure)


def test_optimizers_that_evaluate_within_a_step_serve_where_nothing_is_mapped():
    model, optimizer, runtime = attached(
        optimizer=lambda model: torch.optim.LBFGS(lora_parameters(model).values(), lr=0.1, max_iter=3),
        gates="off",
        coordinator="none",
    )
    losses = []

    def closure():
        optimizer.zero_grad()
        losses.append(loss_of(model, "llama", 0))
        losses[-1].backward()
        return losses[-1]

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


def test_a_factor_that_is_frozen_for_a_while_is_not_moved():
    model, optimizer, runtime = attached()
    train(model, "llama", optimizer, 5)
    before = [f.A for f in standing(runtime)]
    frozen = [p for n, p in model.named_parameters() if "lora_A" in n]
    for step in range(3):
        for parameter in frozen:
            parameter.requires_grad_(False)
        train(model, "llama", optimizer, 1, first=step)
        for parameter in frozen:
            parameter.requires_grad_(True)
        loss_of(model, "llama", 1)
        logits_of(model, "llama")
    assert runtime.step == 8
    assert all(map(torch.equal, before, [f.A for f in standing(runtime)]))


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


@pytest.mark.parametrize("coordinator", ["gcn", "none"])
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused, coordinator):
    """Scaled gradients train as unscaled ones, and a step that GradScaler skips changes nothing.

    Fused optimizers unscale inside their step; the others are not stepped at all after an overflow.
    """

    def run(scaled: bool):
        model = peft_model(targets=FAMILIES["llama"].linear)
        optimizer = torch.optim.AdamW(lora_parameters(model).values(), lr=1e-2, fused=fused)
        runtime = attach(model, optimizer, coordinator=coordinator, **DATA)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        states = []
        for seed, overflow in enumerate([False, True, False]):
            if overflow and not scaled:
                continue
            torch.manual_seed(seed)
            scaler.scale(loss_of(model, "llama", seed)).backward()
            if overflow:
                next(iter(lora_parameters(model).values())).grad.fill_(float("inf"))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            states.append((tensors_of(runtime), weights_of(model)))
        return runtime, states

    runtime, states = run(scaled=True)
    assert (runtime.step, runtime.skipped_steps) == (2, int(fused))
    assert_same(states[1][0], states[0][0])
    assert_same(states[1][1], states[0][1])
    _, plain = run(scaled=False)
    final, expected = states[-1][0], plain[-1][0]
    for name in final:
        if name.endswith(("offset_A", "offset_B", "theta")):
            torch.testing.assert_close(final[name], expected[name], rtol=1e-3, atol=1e-4)


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


def test_gradients_are_compared_once_for_each_report():
    def reported(*counts: int) -> list[float]:
        model, optimizer, runtime = attached()
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


def test_semantic_edges_come_on_time(monkeypatch):
    monkeypatch.setattr(DepthGraph, "redraw_every", 3)
    model, optimizer, runtime = attached(semantic_threshold=-0.99, semantic_top_k=1)
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


def test_detach_leaves_plain_lora():
    model, optimizer, runtime = trained()
    before = weights_of(model)
    runtime.detach()
    assert_same(before, weights_of(model))
    calls = runtime.calls
    train(model, "llama", optimizer, 1)
    assert runtime.calls == calls
    assert torch.equal(loss_of(model, "llama", 5), loss_of(model, "llama", 5))


def test_a_broken_off_run_is_taken_over(caplog):
    model, optimizer, runtime = attached(peft_model(init="warm"))
    train(model, "llama", optimizer, 2)
    evaluation = logits_of(model, "llama")
    backward(model)  # and the run ends here
    again = attach(model, adamw(model), **DATA)
    assert not runtime.is_attached and "that run ends here" in caplog.text
    assert torch.equal(logits_of(model, "llama"), evaluation)
    again.detach()


def test_unused_depths_get_gradients_from_neighbours_alone():
    """A module that the batch did not reach has no gradient of its own, and a coordinator may reach it."""
    for options, moves in (({"coordinator": "none"}, False), ({"coordinator": "gcn", "side": "write"}, True)):
        model, optimizer, runtime = attached(peft_model(init="warm"), **options)
        train(model, "llama", optimizer, 2)
        kind = runtime.kinds[0]
        before = kind.B[1].detach().clone()
        model.train()
        loss_of(model, "llama", 7).backward()
        kind.A[1].grad = kind.B[1].grad = None
        optimizer.step()
        assert (not torch.equal(before, kind.B[1])) is moves


def test_a_detached_runtime_keeps_its_state_and_takes_none():
    model, optimizer, runtime = attached()
    train(model, "llama", optimizer, 2)
    state, weights = runtime.state_dict(), weights_of(model)
    runtime.detach()
    train(model, "llama", optimizer, 1)
    assert_same(state, runtime.state_dict())
    assert "structlora/effective_rank" in runtime.metrics()
    model.load_state_dict(weights, strict=False)
    with pytest.raises(StructLoRAError, match="detached"):
        runtime.load_state_dict(state)
    assert_same(weights, weights_of(model))
