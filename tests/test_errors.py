"""Whatever StructLoRA cannot act on stops with an error that says what was found, what was expected and what to do."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from structlora_trl import StructLoRACallback, StructLoRAError, attach
from structlora_trl.core.graph import DepthGraph
from structlora_trl.core.mapping import Parts
from structlora_trl.errors import refuse_unwritable
from structlora_trl.state import STATE_NAME
from tests.support.jobs import sft
from tests.support.launching import said_by
from tests.support.tiny import DATA, FAMILIES, adamw, attached, peft_model, train


def lora(model, **options):
    return get_peft_model(model, LoraConfig(r=4, **options))


def frozen(which: str):
    model = peft_model(targets=["q_proj"])
    for name, parameter in model.named_parameters():
        if which in name:
            parameter.requires_grad_(False)
    return model


def all_saved_in_full():
    model = peft_model(targets=["q_proj"])
    wrapped = nn.Module()
    wrapped.modules_to_save = model  # names as PEFT's ModulesToSaveWrapper gives them
    model.base_model.add_module("modules_to_save", model.base_model._modules.pop("model"))
    return model


def tied(factor: str, whole: bool):
    """A user ties a factor of all depths by hand, the parameter or the module that holds it."""
    model = peft_model(targets=["q_proj", "v_proj"])
    first, *others = (layer.self_attn.q_proj for layer in model.get_base_model().model.layers)
    for other in others:
        if whole:
            getattr(other, factor)["default"] = getattr(first, factor)["default"]
        else:
            getattr(other, factor)["default"].weight = getattr(first, factor)["default"].weight
    return model


class Odd(nn.Module):
    """Modules of no known family."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"mix": nn.Linear(8, 8)}) for _ in range(2))


def two_adapters_one_active():
    model = peft_model()
    model.add_adapter("b", LoraConfig(r=4, target_modules=["q_proj"]))
    return model


def without_modules():
    model = peft_model()
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    model.peft_config["empty"] = model.peft_config["default"]
    model.base_model.set_adapter("empty")
    return model


# case -> model, options, names that the message holds; set-ups that stop with an error are in `support/setups.py`
CASES = {
    "no such adapter": (peft_model, {"adapter_name": "mine"}, "'mine'.*'default'"),
    "no module of that name": (without_modules, {"adapter_name": "empty"}, "'empty'.*default, other"),
    "not active": (two_adapters_one_active, {"adapter_name": "b"}, r"'b'.*default.*model.set_adapter\('b'\)"),
    "all frozen": (lambda: frozen("lora_"), {}, "'default'.*is_trainable=True"),
    "lora_B frozen": (
        lambda: frozen("lora_B"),
        {"keep": 0.5, "select_at": 10},
        "lora_B of .*q_proj'.*remove `keep`",
    ),
    "in modules_to_save": (all_saved_in_full, {}, "`modules_to_save`"),
    "role of nothing": (lambda: lora(Odd(), target_modules=["mix"]), {"roles": {"mx": "read"}}, "'mx'.*mix"),
    "one depth": (
        lambda: peft_model(layers_to_transform=[1]),
        {},
        "one depth.*a number between dots.*coordinator='none'",
    ),
    "lora_A tied by hand": (lambda: tied("lora_A", False), {}, "in one memory.*untie"),
    "lora_A's module tied by hand": (lambda: tied("lora_A", True), {}, "in one memory.*untie"),
    "lora_B tied by hand": (lambda: tied("lora_B", False), {}, "in one memory.*untie"),
    "directions not at zero": (
        lambda: peft_model(init="pissa"),
        {"keep": 0.5, "select_at": 10},
        "do not start at zero",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_models_are_refused(case):
    build, options, message = CASES[case]
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(StructLoRAError, match=f"(?s)StructLoRA found .*{message}"):
        attach(model, optimizer, **options, **DATA)
    assert all(map(torch.equal, before, model.parameters()))


def test_attaching_twice_ends_the_first_run_and_says_so(caplog):
    model, optimizer, first = attached()
    second = attach(model, optimizer, **DATA)
    assert not first.is_attached and "that run ends here" in caplog.text
    train(model, "llama", optimizer, 1)
    assert (first.step, second.step) == (0, 1)


@pytest.mark.parametrize("kept", [False, True], ids=["dropped gradients", "kept gradients"])
def test_parameters_replaced_after_attaching(kept):
    model, optimizer, _ = attached()
    train(model, "llama", optimizer, 1)
    optimizer.zero_grad(set_to_none=not kept)
    model.load_state_dict(
        {n: value.clone() for n, value in model.state_dict().items()}, strict=False, assign=True
    )
    model.train()
    model(**FAMILIES["llama"].batch(0)).loss.backward()
    with pytest.raises(StructLoRAError, match="12 LoRA parameters.*`assign=True`"):
        optimizer.step()


def test_an_adapter_made_anew_under_the_same_name():
    model = peft_model()
    optimizer, config = adamw(model), model.peft_config["default"]
    attach(model, optimizer, **DATA)
    train(model, "llama", optimizer, 1)
    model.add_adapter("other", config)
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")
    with pytest.raises(StructLoRAError, match="12 LoRA parameters.*`assign=True`"):
        train(model, "llama", optimizer, 1)


def test_deleting_the_adapter_replaces_nothing():
    model, optimizer, _ = attached()
    train(model, "llama", optimizer, 1)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    model.delete_adapter("default")
    train(model, "llama", optimizer, 1)
    assert "default" not in "".join(model.state_dict())


def test_a_failed_attachment_leaves_nothing_behind():
    class Broken(DepthGraph):
        @classmethod
        def over_depth(cls, *args):
            raise ZeroDivisionError

    model = peft_model()
    optimizer = adamw(model)
    with pytest.raises(ZeroDivisionError):
        attach(model, optimizer, parts=Parts(graph=Broken.over_depth), **DATA)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert "step" not in vars(optimizer)
    attach(model, optimizer, **DATA)


class Unhooked(torch.optim.Optimizer):
    """A wrapper that does not call its base class's `__init__`."""

    def __init__(self, inner):
        self.inner, self.param_groups, self.state, self.defaults = inner, inner.param_groups, inner.state, {}

    def step(self, closure=None):
        self.inner.step(closure)


def test_optimizers_that_run_no_hooks():
    model = peft_model()
    with pytest.raises(StructLoRAError, match="Unhooked"):
        attach(model, Unhooked(adamw(model)), **DATA)


def test_two_callbacks(tmp_path):
    trainer = sft(tmp_path, [StructLoRACallback(), StructLoRACallback(keep=0.3)])
    with pytest.raises(StructLoRAError, match="2 StructLoRA callbacks"):
        trainer.train()


def test_callback_without_peft(tmp_path):
    with pytest.raises(StructLoRAError, match="peft_config"):
        sft(tmp_path, [StructLoRACallback()], peft=False).train()


def test_callback_outside_a_trainer():
    with pytest.raises(StructLoRAError, match="`transformers.Trainer`.*attach"):
        StructLoRACallback().on_train_begin(None, None, None)


def test_optimizer_whose_step_runs_no_hooks(tmp_path):
    class Unhooked(TrainerCallback):
        """Steps by a way that torch's hooks do not see, as optimizers do that replace `step` on the instance."""

        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            inner = optimizer.optimizer
            bare = type(inner).step
            while hasattr(bare, "__wrapped__"):
                bare = bare.__wrapped__
            inner.step = torch.no_grad()(lambda closure=None: bare(inner))

    callback = StructLoRACallback()
    trainer = sft(tmp_path, [callback, Unhooked()])
    with pytest.raises(StructLoRAError, match="AdamW.step.*optim"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_resume_without_our_state(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    sft(tmp_path, None, **options).train()
    with pytest.raises(StructLoRAError, match=f"{STATE_NAME} in .*checkpoint-4.*`resume_from_checkpoint`"):
        sft(tmp_path, [StructLoRACallback()], **options).train(resume_from_checkpoint=True)


def test_distributed_launches_are_refused(monkeypatch):
    model = peft_model()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(StructLoRAError, match="2 processes.*DDP"):
        attach(model, adamw(model), **DATA)


# case -> names that the message holds
UNSERVED = {
    "FSDP2 of a part": "placements none",
    "tensor parallelism": "tensor parallelism.*FSDP2 or DeepSpeed ZeRO-3",
    "FSDP1": "FSDP1.*`fsdp_version: 2` in the `fsdp_config`",
    "ZeRO stage 0": "ZeRO stage 0.*1, 2 or 3",
    "pipeline": "pipeline parallelism.*ZeRO stage 1, 2 or 3",
    "ZeRO++": r"ZeRO\+\+.*`zero_quantized_",
    "MiCS": "MiCS_Optimizer.*standard optimizer",
    "another optimizer of DeepSpeed's": "SuperOffloadOptimizer_Stage3.*ZeRO stage 1, 2 or 3",
    "NVMe": "NVMe.*`device: cpu`",
    "Muon": "Muon",
    "torch_autocast": "`torch_autocast`.*`bf16` or `fp16`",
    "LoRA-FA's optimizer": "LoraFAOptimizer.*DDP",
    "Riemannian optimizer": "RiemannianPreconditionedOptimizer.*DDP",
    "DataParallel": "`nn.DataParallel`.*`torchrun`",
    "engine withheld": "wrapped model",
    "a kind in several groups": "lora_B of .* in 3 groups.*`sub_group_size`",
    "partial offload": "`offload_optimizer.ratio` below 1",
}


@pytest.fixture(scope="module")
def unserved():
    return said_by("unserved_engines")


@pytest.mark.parametrize("name", UNSERVED)
def test_unserved_engines_are_refused_by_name(name, unserved):
    if name not in unserved:
        pytest.skip("this version of PEFT has no such optimizer")
    assert re.search(UNSERVED[name], unserved[name])


def test_errors_have_three_parts_and_survive_pickling():
    error = StructLoRAError("this", "that", "do so")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == "StructLoRA found this. Expected that. Fix: do so."
    assert re.search(r"found .* Expected .* Fix: ", str(error))


def test_a_folder_that_the_user_may_not_write_to(tmp_path, monkeypatch):
    """Before the work, with the folder's name. Root may write anywhere, so that the answer is asked for here."""
    refuse_unwritable(tmp_path / "new" / "adapter")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(StructLoRAError, match=re.escape(f"no permission to write in {tmp_path}, above")):
        refuse_unwritable(tmp_path / "new" / "adapter")
