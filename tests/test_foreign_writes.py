"""Weights that other code writes: values that are swapped out and back are fine, others stop the run until `reload()`."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from structlora_trl import StructLoRAError, attach
from tests.support.tiny import (
    FAMILIES,
    adamw,
    assert_same,
    attached,
    batch_of,
    logits_of,
    lora_parameters,
    loss_of,
    peft_model,
    tensors_of,
    train,
    trained,
    weights_of,
)


def backward(model):
    model.train()
    loss_of(model, "llama", 7).backward()


def other_weights(model) -> dict:
    generator = torch.Generator().manual_seed(4)
    state = get_peft_model_state_dict(model)
    return {
        name: value + 0.02 * torch.randn(value.shape, generator=generator) for name, value in state.items()
    }


def by_load_state_dict(model, new):
    model.load_state_dict(
        {name.replace(".weight", ".default.weight"): value for name, value in new.items()}, strict=False
    )


def by_data(model, new):
    for name, value in new.items():
        model.get_parameter(name.replace(".weight", ".default.weight")).data.copy_(value)


def by_new_storage(model, new):
    for name, value in new.items():
        model.get_parameter(name.replace(".weight", ".default.weight")).data = value.clone()


WRITERS = {
    "load_state_dict": by_load_state_dict,
    "set_peft_model_state_dict": set_peft_model_state_dict,
    ".data": by_data,
    "new storage": by_new_storage,
}


def with_adapter(state):
    fresh = peft_model(targets=FAMILIES["llama"].linear)
    set_peft_model_state_dict(fresh, state)
    return logits_of(fresh, "llama")


@pytest.mark.parametrize("writer", WRITERS)
def test_other_weights_are_shown_refused_and_reloaded(writer):
    model, optimizer, runtime = trained()
    new = other_weights(model)
    WRITERS[writer](model, new)
    expected, saved = with_adapter(new), get_peft_model_state_dict(model)
    assert (logits_of(model, "llama") - expected).abs().max() <= 1e-6  # what stands is evaluated and saved
    assert_same(saved, new)
    model.train()
    for _ in range(2):
        with pytest.raises(StructLoRAError, match="reload"):
            loss_of(model, "llama", 7)
    before = runtime.step
    runtime.reload()
    assert (logits_of(model, "llama") - expected).abs().max() <= 1e-6
    train(model, "llama", optimizer, 2)
    assert runtime.step == before + 2
    assert 0 < (logits_of(model, "llama") - expected).abs().max() < 1


@pytest.mark.parametrize("name", ["ib", "topk_norm"])
def test_reload_changes_no_output(name):
    """Where no direction is selected, the weights that stand are not written again."""
    model, optimizer, runtime = attached(filter=name)
    train(model, "llama", optimizer, 2)
    by_load_state_dict(model, other_weights(model))
    before = logits_of(model, "llama")
    runtime.reload()
    assert torch.equal(logits_of(model, "llama"), before)


def test_reload_is_attaching_anew():
    """Gates, coordinator, their optimizer and the schedule's peak start again."""
    model, _, runtime = trained()
    by_load_state_dict(model, other_weights(model))
    twin = copy.deepcopy(model)
    fresh = adamw(twin)
    anew = attach(twin, fresh)
    runtime.reload()
    assert_same(tensors_of(runtime), tensors_of(anew))
    assert runtime.metrics()["structlora/peak_lr"] == 0


def test_a_write_within_a_step_is_refused():
    for write in (by_load_state_dict, set_peft_model_state_dict, by_data):
        for read in (lambda model: None, lambda model: logits_of(model, "llama")):
            model, optimizer, runtime = trained()
            backward(model)
            read(model)
            write(model, other_weights(model))
            with pytest.raises(StructLoRAError, match="reload"):
                optimizer.step()
            assert runtime.step == 3
    model, optimizer, runtime = trained()
    backward(model)
    by_load_state_dict(model, other_weights(model))
    optimizer.zero_grad()
    with pytest.raises(StructLoRAError, match="reload"):  # a step without gradients would drop them
        optimizer.step()


@pytest.mark.parametrize("flip", ["eval", "load"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_with_checkpointing_recomputes_at_the_weights_of_its_forward(flip, reentrant):
    def gradients(flips: bool):
        model, optimizer, runtime = trained()
        if reentrant:
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        loss = loss_of(model, "llama", 7)
        if flips and flip == "eval":
            runtime.eval()
        elif flips:
            model.load_state_dict({n: v for n, v in model.state_dict().items() if "lora_" in n}, strict=False)
        loss.backward()
        found = [p.grad.clone() for p in lora_parameters(model).values()]
        optimizer.step()
        assert runtime.step == 4
        return found

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_backward_at_other_weights_than_its_forward_is_refused():
    model, optimizer, runtime = trained()
    model.train()
    loss = loss_of(model, "llama", 7)
    versions = runtime.engine.keep_versions()  # as with engines that lack autograd's guard
    runtime.eval()
    versions.close()
    loss.backward()
    for _ in range(2):
        with pytest.raises(StructLoRAError, match="backward"):
            optimizer.step()
    optimizer.zero_grad()
    train(model, "llama", optimizer, 1)
    assert runtime.step == 4


def test_forwards_of_both_modes_in_one_loss_are_refused_by_name():
    model, _, _ = trained()
    model.train()
    first = loss_of(model, "llama", 7)
    model.eval()
    second = loss_of(model, "llama", 8)
    model.train()
    with pytest.raises(StructLoRAError, match="eval"):
        (first + second).backward()


def penalty(model):
    return sum(p.square().sum() for p in lora_parameters(model).values())


def test_a_penalty_built_before_the_first_forward_is_refused_by_name():
    model, *_ = attached(peft_model())
    model.train()
    early = penalty(model)
    for _ in range(2):
        with pytest.raises(StructLoRAError, match="penalty.*after the model's forward.*runtime.train"):
            loss_of(model, "llama", 7)
    del early
    assert loss_of(model, "llama", 7).requires_grad


@pytest.mark.parametrize("trains_first", [False, True])
def test_a_penalty_trains_where_training_weights_stand(trains_first):
    model = peft_model()
    kept = penalty(model)  # of before, for a report
    model, optimizer, runtime = attached(model)
    with torch.no_grad():
        penalty(model)
    model.train()
    for step in range(3):
        if trains_first:
            runtime.train()
            regularizer = penalty(model)
        loss = loss_of(model, "llama", step)
        if not trains_first:
            regularizer = penalty(model)
        (loss + 0.1 * regularizer).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert runtime.step == 3 and kept.requires_grad


def test_ddp_around_an_attached_model_is_no_penalty():
    """DDP keeps the ends of graphs alive, whether it comes before or after attach."""
    model, optimizer, runtime = attached(peft_model())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        ddp(**batch_of(model, "llama", 0)).loss.backward()
        optimizer.step()
    finally:
        dist.destroy_process_group()
    assert runtime.step == 1


def test_an_average_swapped_in_and_out_changes_nothing():
    def run(swaps: bool):
        model, optimizer, runtime = trained()
        parameters = list(lora_parameters(model).values())
        for step in range(2):
            if swaps:
                kept = [p.detach().clone() for p in parameters]
                with torch.no_grad():
                    torch._foreach_mul_(parameters, 0.9)
                    logits_of(model, "llama")
                    torch._foreach_copy_(parameters, kept)
            train(model, "llama", optimizer, 1, first=step)
        return runtime.state_dict()

    assert_same(run(True), run(False))


def test_figures_while_an_average_stands_change_nothing():
    model, _, runtime = trained(dtype=torch.bfloat16)
    parameters = list(lora_parameters(model).values())
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_mul_(parameters, 0.5)
        before = runtime.metrics()
        runtime.state_dict()
        torch._foreach_copy_(parameters, kept)
    runtime.train()
    runtime.eval()
    assert all(map(torch.equal, kept, parameters))
    assert runtime.metrics()["structlora/effective_rank"] == before["structlora/effective_rank"]


def test_hooks_on_the_step_that_stood_before_see_evaluation_weights():
    model = peft_model(targets=FAMILIES["llama"].linear)
    optimizer, seen = adamw(model), {}
    optimizer.register_step_post_hook(lambda *_: seen.update(weights_of(model)))
    attach(model, optimizer)
    for step in range(3):
        train(model, "llama", optimizer, 1, first=step)
        assert_same(seen, weights_of(model))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value):
    model, optimizer, _ = trained()
    for name, parameter in lora_parameters(model).items():
        if "lora_B" in name:
            parameter.data[0, :1].fill_(value)
    with pytest.raises(StructLoRAError, match="register_for_checkpointing"):
        train(model, "llama", optimizer, 1)


def test_accelerators_checkpoints_without_our_state(tmp_path):
    """With it, see the set-up `accelerator.save_state and load_state`."""

    def new():
        accelerator = Accelerator(cpu=True)
        model = peft_model()
        model, optimizer = accelerator.prepare(model, adamw(model))
        attach(model, optimizer)
        return accelerator, model, optimizer

    accelerator, model, optimizer = new()
    train(model, "llama", optimizer, 4)
    accelerator.save_state(tmp_path)
    accelerator, again, _ = new()
    accelerator.load_state(tmp_path)
    assert (logits_of(again, "llama") - logits_of(model, "llama")).abs().max() <= 1e-6
    with pytest.raises(StructLoRAError, match="register_for_checkpointing"):
        loss_of(again, "llama", 7)
