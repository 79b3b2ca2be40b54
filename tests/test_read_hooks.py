"""Evaluation, generation, merging, copies, pickles and saved files use evaluation weights, also within a step that broke off."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from peft import PeftModel
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from structlora_trl import StructLoRAError
from tests.support.tiny import (
    FAMILIES,
    adamw,
    assert_same,
    attached,
    base_model,
    logits_of,
    lora_parameters,
    loss_of,
    peft_model,
    tensors_of,
    train,
    trained,
)

PROMPT = torch.tensor([[5, 6, 7]])


class Interrupted(Exception):
    pass


class Breaks(torch.optim.AdamW):
    breaks = False

    @torch.no_grad()
    def step(self, closure=None):
        if self.breaks:
            for group in self.param_groups:
                for parameter in group["params"][:5]:
                    parameter.add_(0.5)
            raise Interrupted
        return super().step(closure)


# How a step is left in the middle. All of them leave other than evaluation weights in the model.
def after_the_forward(model, optimizer):
    model.train()
    return loss_of(model, "llama", 7)


def after_the_backward(model, optimizer):
    after_the_forward(model, optimizer).backward()


def in_the_optimizer(model, optimizer):
    after_the_backward(model, optimizer)
    optimizer.breaks = True
    with pytest.raises(Interrupted):
        optimizer.step()
    optimizer.breaks = False


def generated(model):
    out = model.generate(
        PROMPT, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return torch.cat(out.logits)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def merged_for_a_while(model):
    model.merge_adapter()
    logits = logits_of(model.get_base_model(), "llama")
    model.unmerge_adapter()
    return logits


def saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    return logits_of(PeftModel.from_pretrained(base_model("llama"), tmp_path), "llama")


READERS = {
    "evaluate": lambda m, _: logits_of(m, "llama"),
    "evaluate the decoder": lambda m, _: of_a_part(m, m.base_model.model.model),
    "evaluate a block": lambda m, _: of_a_part(m, m.base_model.model.model.layers[1]),
    "evaluate the base model": lambda m, _: logits_of(m.get_base_model(), "llama"),
    "deepcopy": lambda m, _: logits_of(copy.deepcopy(m), "llama"),
    "deepcopy the base model": lambda m, _: logits_of(copy.deepcopy(m.get_base_model()), "llama"),
    "pickle": lambda m, _: logits_of(pickled(m), "llama"),
    "merge and unmerge": lambda m, _: merged_for_a_while(m),
    "save_pretrained": saved,
    "state_dict of a part": lambda m, _: with_state(m.base_model.state_dict()),
    "merge_and_unload": lambda m, _: logits_of(m.merge_and_unload(), "llama"),
}


def of_a_part(model, part):
    """Logits, where a part that lies within the model is what is called."""
    model.eval()
    seen, whole = [], {**FAMILIES["llama"].batch(99), "use_cache": False}
    keep = part.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        logits = model(**whole).logits
        keep.remove()
        args, kwargs = seen[0]
        model.train()
        loss_of(model, "llama", 7)  # training weights stand again
        model.eval()
        found = part(*args, **kwargs)
        replaced = part.register_forward_hook(lambda *_: found)
        again = model(**whole).logits
    replaced.remove()
    assert torch.equal(again, logits)
    return again


def with_state(state):
    fresh = peft_model(targets=FAMILIES["llama"].linear)
    fresh.base_model.load_state_dict(state)
    return logits_of(fresh, "llama")


@pytest.mark.parametrize("leave", [after_the_forward, after_the_backward, in_the_optimizer])
def test_readers_within_a_step_see_evaluation_weights(leave, tmp_path):
    model, optimizer, runtime = trained(optimizer=lambda m: Breaks(lora_parameters(m).values(), lr=1e-2))
    expected, expected_text = logits_of(model, "llama"), generated(model)
    for name, read in READERS.items():
        leave(model, optimizer)
        assert runtime.weights in ("training", "latent")
        # To rounding where values are merged into others or copied to a file and back.
        assert (read(model, tmp_path) - expected).abs().max() <= 1e-5, name
    model, optimizer, runtime = trained(optimizer=lambda m: Breaks(lora_parameters(m).values(), lr=1e-2))
    for mode in (False, True):  # a notebook's model is in training mode after Ctrl-C
        leave(model, optimizer)
        model.train(mode)
        assert torch.equal(generated(model), expected_text)


@pytest.mark.parametrize("part", ["base_model.model.model", "base_model.model.model.layers.1"])
def test_parts_of_every_kind_of_adapter_are_ways_into_the_model(part):
    """To be read at evaluation weights, and to be trained through."""
    for init in ("fresh", "dora", "vera"):
        model, optimizer, runtime = attached(peft_model(init=init))
        train(model, "llama", optimizer, 1)
        of_a_part(model, model.get_submodule(part))
        optimizer.zero_grad()
        runtime.eval()
        model.train()
        hidden = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
        inner = model.get_submodule(part)
        rotary = model.get_base_model().model.rotary_emb(hidden, torch.arange(4)[None])
        given = {"inputs_embeds": hidden} if part.endswith("model") else {}
        out = inner(**given) if given else inner(hidden, position_embeddings=rotary)
        getattr(out, "last_hidden_state", out).square().mean().backward()
        optimizer.step()
        assert runtime.step == 2, init


def test_activation_checkpointing_by_torchs_wrapper_changes_no_names(tmp_path):
    """As accelerate's `fsdp_activation_checkpointing` does it."""
    model = peft_model()
    model.config.use_cache = False  # which recomputing would fill once more
    layers = model.get_base_model().model.layers
    for index in range(len(layers)):
        layers[index] = checkpoint_wrapper(layers[index])
    model, optimizer, runtime = attached(model)
    train(model, "llama", optimizer, 2)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    after_the_forward(model, optimizer)
    assert_same(model.state_dict(), expected)
    assert runtime.weights == "training"
    model.load_state_dict(expected)
    assert runtime.weights == "evaluation"
    _, _, other = attached()
    other.load_state_dict(runtime.state_dict())
    assert_same(tensors_of(other), tensors_of(runtime))


def test_training_goes_on_after_readers_as_if_there_were_none():
    def run(reads: bool):
        model, optimizer, runtime = trained()
        for _ in range(3):
            loss = after_the_forward(model, optimizer)
            if reads:  # a backward is still to come
                logits_of(model, "llama")
                generated(model)
                copy.deepcopy(model)
                model.state_dict()
            loss.backward()
            if reads:
                with torch.inference_mode():
                    logits_of(model, "llama")
                pickled(model)
            optimizer.step()
            optimizer.zero_grad()
        return runtime.state_dict()

    expected, found = run(False), run(True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_training_goes_on_after_an_interrupted_step():
    model, optimizer, runtime = trained(optimizer=lambda m: Breaks(lora_parameters(m).values(), lr=1e-2))
    latents = [f.B.clone() for f in runtime.engine.read_latents()]
    in_the_optimizer(model, optimizer)
    optimizer.zero_grad()
    assert all(torch.equal(a, f.B) for a, f in zip(latents, runtime.engine.read_latents(), strict=True))
    train(model, "llama", optimizer, 2)
    assert runtime.step == 5


def test_reload_after_a_step_that_broke_off_is_refused():
    """The step's latents stand then, half of them stepped."""
    model, optimizer, runtime = trained(optimizer=lambda m: Breaks(lora_parameters(m).values(), lr=1e-2))
    expected = logits_of(model, "llama")
    in_the_optimizer(model, optimizer)
    with pytest.raises(StructLoRAError, match=r"latent weights stand.*`runtime.eval\(\)`"):
        runtime.reload()
    runtime.eval()
    runtime.reload()
    assert (logits_of(model, "llama") - expected).abs().max() <= 1e-6


def test_pickles_need_no_optimizer_and_detached_models_are_untouched():
    plain = peft_model(targets=FAMILIES["llama"].linear)
    model, _, runtime = trained()
    again = pickled(model)
    train(again, "llama", adamw(again), 1)
    runtime.detach()
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert ours.__dict__.keys() - theirs.__dict__.keys() <= {"save_pretrained"}
        assert not ours._forward_pre_hooks and not ours._forward_hooks and not ours._state_dict_hooks


def test_an_evaluation_that_fails_is_over():
    model, optimizer, runtime = trained()
    after_the_backward(model, optimizer)
    model.eval()
    with pytest.raises(Interrupted), torch.no_grad():
        fail_in_the_forward(model)
    model.train()
    optimizer.step()
    optimizer.zero_grad()
    stood = [p.detach().clone() for p in lora_parameters(model).values()]
    logits_of(model, "llama")
    assert runtime.weights == "evaluation"
    assert all(torch.equal(p, q) for p, q in zip(lora_parameters(model).values(), stood, strict=True))


@pytest.mark.parametrize("mode", [True, False])
def test_an_interrupted_forward_decides_nothing_later(mode):
    """A Ctrl-C, which runs no hooks of modules. What comes is a forward of the base model, where gradients are on."""
    model, optimizer, runtime = trained()
    expected = logits_of(model, "llama")
    model.train(mode)
    with pytest.raises(KeyboardInterrupt):
        fail_in_the_forward(model, KeyboardInterrupt)
    model.eval()
    assert torch.equal(model.get_base_model()(**FAMILIES["llama"].batch(99)).logits, expected)
    model.train()
    for step in range(2):
        model.get_base_model()(**FAMILIES["llama"].batch(step)).loss.backward()
        assert runtime.weights == "training"
        optimizer.step()
        optimizer.zero_grad()
    assert runtime.step == 5


def in_a_forward(mode: bool):
    """A Ctrl-C within a forward, which leaves what hooks of modules noted at its start."""

    def leave(model, optimizer):
        after_the_forward(model, optimizer)
        model.train(mode)
        with pytest.raises(KeyboardInterrupt):
            fail_in_the_forward(model, KeyboardInterrupt)

    return leave


@pytest.mark.parametrize(
    "leave",
    [after_the_backward, in_a_forward(True), in_a_forward(False), in_the_optimizer],
    ids=["backward", "training forward", "evaluation", "optimizer"],
)
def test_a_detached_runtime_keeps_neither_model_nor_optimizer(leave):
    model, optimizer, runtime = trained(optimizer=lambda m: Breaks(lora_parameters(m).values(), lr=1e-2))
    leave(model, optimizer)
    runtime.detach()
    let_go = weakref.ref(model), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [reference() for reference in let_go] == [None, None]
    assert runtime.metrics() and runtime.state_dict() and runtime.engine.read_working()


@pytest.mark.parametrize("leave", [None, after_the_backward], ids=["between steps", "within a step"])
@pytest.mark.parametrize("end", ["merge_and_unload", "unload"])
def test_the_runtime_ends_with_the_adapter(end, leave):
    model, optimizer, runtime = trained()
    if leave:
        leave(model, optimizer)
    base = model.get_base_model()
    getattr(model, end)()
    assert not runtime.is_attached and runtime.weights == "evaluation"
    assert not any(m._forward_pre_hooks or m._forward_hooks or m._state_dict_hooks for m in base.modules())
    A = weakref.ref(runtime.kinds[0].A[0])
    del model, optimizer, runtime
    gc.collect()
    assert A() is None


def test_a_module_that_calls_itself_is_one_visit():
    model, optimizer, runtime = trained()
    loss = after_the_forward(model, optimizer)
    base = model.get_base_model()
    forward, calls = base.forward, []

    def twice(**batch):
        calls.append(batch)
        return base(**batch) if len(calls) == 1 else forward(**batch)

    base.forward = twice
    base.eval()
    with torch.no_grad():
        base(**FAMILIES["llama"].batch(1))
    assert runtime.weights == "training"
    loss.backward()
    optimizer.step()
    assert runtime.step == 4


def test_loading_another_adapter_between_forward_and_backward(tmp_path):
    peft_model(init="warm", targets=FAMILIES["llama"].linear).save_pretrained(tmp_path)
    model, optimizer, runtime = trained()
    loss = after_the_forward(model, optimizer)
    model.load_adapter(tmp_path, "reference")
    model.set_adapter("default")
    loss.backward()
    optimizer.step()
    assert runtime.step == 4


def fail_in_the_forward(model, error=Interrupted):
    def fail(*_):
        raise error

    hook = model.get_output_embeddings().register_forward_pre_hook(fail)
    try:
        model(**FAMILIES["llama"].batch(0))
    finally:
        hook.remove()


def test_torchs_distributed_checkpoints_of_an_optimizer():
    """They have a fresh optimizer step on gradients of zero, so that it has a state to load into."""
    model, optimizer, runtime = trained()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))  # it holds the optimizer's own tensors
    fresh, its_optimizer, its_runtime = trained(steps=0)
    its_runtime.load_state_dict(runtime.state_dict())
    set_optimizer_state_dict(fresh, its_optimizer, saved)
    for m, o in ((model, optimizer), (fresh, its_optimizer)):
        train(m, "llama", o, 2)
    ours, theirs = runtime.state_dict(), its_runtime.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_step_on_zeros_kept_from_the_last_one():
    model, optimizer, runtime = trained()
    after_the_backward(model, optimizer)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()  # a batch was skipped
    optimizer.zero_grad(set_to_none=False)
    assert runtime.step == 4 and runtime.weights == "evaluation"
    train(model, "llama", optimizer, 1)
    assert runtime.step == 5
