"""Gates in a run: where they act, whose gradients they learn from, and what is said where they do not act."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from structlora_trl import StructLoRAError, attach, save_gates
from structlora_trl.gates_file import GATES_NAME, read_openness
from tests.support.tiny import (
    DATA,
    FAMILIES,
    adamw,
    assert_same,
    attached,
    differing,
    loss_of,
    peft_model,
    tensors_of,
    train,
    weights_of,
)


def logits_of(runtime) -> dict[str, torch.Tensor]:
    return {name: x for name, x in tensors_of(runtime).items() if name.startswith("/gates/")}


def backward(model, seed: int = 0) -> None:
    torch.manual_seed(seed)
    loss_of(model.train(), "llama", seed).backward()


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_generation_in_train_mode_is_that_of_a_copy_without_gates(reentrant):
    """As callbacks generate between steps, whichever form of checkpointing training has."""
    model, optimizer, _ = attached(peft_model(init="warm", targets=FAMILIES["llama"].linear))
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    train(model, "llama", optimizer, 3)
    tokens = torch.tensor([[5, 6, 7]])

    @torch.no_grad()
    def seen(model):
        model.train()
        new = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False
        )
        return new, model(input_ids=new).logits

    for found, expected in zip(seen(model), seen(copy.deepcopy(model)), strict=True):
        assert torch.equal(found, expected)
    model.train()
    assert not torch.equal(loss_of(model, "llama", 0), loss_of(model, "llama", 0))


def clear_hooks(model) -> None:
    for module in model.modules():
        module._forward_hooks.clear()


@pytest.mark.parametrize("how", [nn.Module.eval, clear_hooks], ids=["eval()", "hooks cleared"])
@pytest.mark.parametrize("first", [0, 2])
def test_gates_that_do_not_act_are_told_once(how, first, caplog):
    model, optimizer, runtime = attached(peft_model(init="warm"))
    train(model, "llama", optimizer, first)
    assert "No gate acted" not in caplog.text
    before, mode = logits_of(runtime), how(model)
    model.train(mode is None)
    for seed in range(3):
        if mode is None and not first:  # a gate that has never fired beside gradients in `train()`
            with pytest.raises(StructLoRAError, match="6 LoRA modules with gradients whose gates never ran"):
                backward(model), optimizer.step()
            return
        loss_of(model, "llama", seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert caplog.text.count("No gate acted") == 1 and runtime.step == first + 3
    assert_same(before, logits_of(runtime))


@pytest.mark.parametrize("scaled", [True, False])
def test_fp16_needs_its_scaler(scaled):
    """Gates' gradients hold the scale of the loss, which no optimizer takes out of them."""

    def run(autocast=None, **options):
        model = peft_model(init="warm")
        optimizer = adamw(model)
        runtime = attach(model, optimizer, **DATA, **options)
        train(model, "llama", optimizer, 4, autocast=autocast, **options)
        return logits_of(runtime)

    if not scaled:
        with pytest.raises(StructLoRAError, match="fp16 activations and no GradScaler.*scaler=scaler"):
            run(torch.float16)
        return
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    found, expected = run(torch.float16, scaler=scaler), run()
    for name, logits in expected.items():
        torch.testing.assert_close(found[name], logits, rtol=1e-2, atol=1e-2)


def test_a_discarded_backward_leaves_no_gradient_of_gates():
    """`zero_grad` drops those of the optimizer's parameters alone, and gates are none of them."""
    ends = []
    for discards in (False, True):
        model, optimizer, runtime = attached(peft_model(init="warm"))
        for seed in range(3):
            if discards:
                backward(model, seed + 10)
                optimizer.zero_grad()
            backward(model, seed)
            optimizer.step()
            optimizer.zero_grad()
        ends.append((logits_of(runtime), weights_of(model)))
    assert_same(ends[0][0], ends[1][0])
    assert_same(ends[0][1], ends[1][1])


def test_gates_of_frozen_modules_rest():
    model, optimizer, runtime = attached(peft_model(init="warm"))
    for name, parameter in model.named_parameters():
        if "layers.0" in name and "lora_" in name:
            parameter.requires_grad_(False)
    before = logits_of(runtime)
    train(model, "llama", optimizer, 2)
    after = logits_of(runtime)
    assert {*differing(before, after)} == {name for name in before if "layers.0" not in name}


def test_gates_that_do_not_learn_keep_their_openness():
    model, optimizer, runtime = attached(peft_model(init="warm"), gate_lr=0, gate_openness=0.5)
    train(model, "llama", optimizer, 2)
    assert all(opened.tolist() == [0.5] * 4 for opened in runtime.openness().values())


def test_the_metrics_are_of_the_openness():
    model, optimizer, runtime = attached(keep=0.25, select_at=2)
    train(model, "llama", optimizer, 2)
    opened = torch.cat(list(runtime.openness().values()))
    found = {n.removeprefix("structlora/"): x for n, x in runtime.metrics().items()}
    assert found["gate_openness"] == pytest.approx(opened.mean().item())
    assert found["closed_share"] == 0.75 == (opened == 0).double().mean()
    alpha = 1 / opened[opened > 0] - 1
    assert found["nats"] == pytest.approx((0.5 * torch.log1p(1 / alpha)).sum().item(), rel=1e-5)
    runtime.detach()
    assert runtime.openness().keys() and not runtime.is_off and "gaussian gates on 6 modules" in repr(runtime)


def test_openness_is_saved_beside_the_adapter_of_a_loop(tmp_path):
    model, optimizer, runtime = attached()
    train(model, "llama", optimizer, 2)
    runtime.detach()
    assert save_gates(runtime, tmp_path) == tmp_path / GATES_NAME
    assert_same(read_openness(tmp_path), runtime.openness())
    plain = attached(gates="off")[2]
    assert save_gates(plain, tmp_path) is read_openness(tmp_path) is None
