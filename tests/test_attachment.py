"""What `attach` serves and what it refuses by name: PEFT's types, its initialisations and variants, and torch's ambient state."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from structlora_trl import StructLoRAError, attach
from tests.support.promises import skip_without
from tests.support.setups import NOT_REPEATED, REPEATED, SETUPS, lora
from tests.support.tiny import DATA, adamw, base_model, logits_of, peft_model, train, warm_up

SERVED = ("LORA", "VERA")
# What a type's configuration needs on the tiny model, where its defaults do not fit.
NEEDS = {
    "ADALORA": {"total_step": 20, "tinit": 1, "tfinal": 2},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2, "target_modules": "self_attn"},
    "FOURIERFT": {"n_frequency": 8},
    "VBLORA": {"vector_length": 16, "num_vectors": 16},
    "MISS": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "C3A": {"block_size": 16},
    "WAVEFT": {"n_frequency": 8},
    "PSOFT": {"r": 4},
}
# Which has a row of set-ups.
TYPES = [t.value for t in PeftType if t in PEFT_TYPE_TO_CONFIG_MAPPING and t != PeftType.XLORA]


@pytest.mark.parametrize("name", TYPES)
def test_every_type_of_peft_is_served_or_refused_by_name(name):
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)]
    known = inspect.signature(config).parameters
    options = {"target_modules": ["q_proj", "v_proj"], "num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
    options = {option: value for option, value in options.items() if option in known} | NEEDS.get(name, {})
    model = get_peft_model(base_model("llama"), config(**options))
    trained = [p for p in model.parameters() if p.requires_grad] or [torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    if name not in SERVED:
        with pytest.raises(StructLoRAError, match=f"PEFT type {name}.*`LoraConfig`"):
            attach(model, optimizer, **DATA)
        return
    runtime = attach(model, optimizer, **DATA)
    train(model, "llama", optimizer, 2)
    assert runtime.step == 2


@pytest.mark.parametrize(
    "name", [*NOT_REPEATED, *REPEATED, "LoftQ", "LoRA", "Gaussian init", "orthogonal init"]
)
def test_a_start_that_moves_the_base_is_told(name, caplog):
    (row,) = (row for row in SETUPS["Adapters"] if row.name == name)
    skip_without(row.needs)
    model = row.model()
    attach(model, adamw(model), **DATA)
    assert ("path_initial_model_for_weight_conversion" in caplog.text) is (name in NOT_REPEATED + REPEATED)
    assert ("PEFT does not repeat" in caplog.text) is (name in NOT_REPEATED)
    assert ("PEFT repeats the move" in caplog.text) is (name in [*REPEATED, "LoftQ"])
    assert ("To use it elsewhere: save the base too" in caplog.text) is (name == "LoftQ")


@pytest.mark.parametrize("name", [*NOT_REPEATED, *REPEATED])
def test_a_start_that_moved_the_base_is_converted_as_told(name, tmp_path):
    """PEFT's way, with StructLoRA between: an adapter of twice the rank, on the original base."""
    (row,) = (row for row in SETUPS["Adapters"] if row.name == name)
    skip_without(row.needs)
    model = row.model()
    start = model.peft_config["default"].init_lora_weights
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    optimizer = adamw(model)
    runtime = attach(model, optimizer, **DATA)
    train(model, "llama", optimizer, 3)
    runtime.detach()
    expected = logits_of(model, "llama")
    folder = tmp_path / "converted"
    model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    loaded = PeftModel.from_pretrained(row.base(), folder)
    torch.testing.assert_close(logits_of(loaded, "llama"), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "start, options, told",
    [
        (True, {}, True),
        ("gaussian", {}, True),
        (True, {"align_init": False}, False),
        (True, {"coordinator": "none"}, False),
        ("warm", {}, False),
        ("pissa", {}, False),
    ],
)
def test_a_fresh_adapter_starts_with_one_A_per_kind_and_the_log_tells(start, options, told, caplog):
    """A copy of the weights that is older than `attach` holds another lora_A then."""
    model = get_peft_model(base_model("llama"), lora(init_lora_weights=True if start == "warm" else start))
    if start == "warm":
        warm_up(model)
    copy = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name}
    caplog.set_level(logging.INFO, "structlora_trl")
    runtime = attach(model, adamw(model), **options, **DATA)
    changed = any(not torch.equal(p, copy[name]) for name, p in model.named_parameters() if name in copy)
    assert changed is told
    for kind in runtime.kinds:
        assert all(torch.equal(kind.A[0], a) for a in kind.A[1:]) is told
    line = next(record.getMessage() for record in caplog.records if "StructLoRA on" in record.getMessage())
    assert ("lora_A" in line) is told


def test_kinds_of_unknown_role_are_named_where_depths_are_compared():
    (row,) = (row for row in SETUPS["Adapters"] if "unknown role" in row.name)
    model = row.model()
    runtime = attach(model, row.optimizer(model), row.method, **DATA)
    assert "not coordinated (role unknown, see `roles`): mixing" in repr(runtime)
    coordinated = {m.kind.name: bool(m.coordinators) for m in runtime.maps}
    assert coordinated == {"blocks.*.fc1": True, "blocks.*.mixing": False, "blocks.*.fc2": True}
    runtime.detach()
    runtime = attach(model, row.optimizer(model), {**row.method, "roles": {"mixing": "read"}}, **DATA)
    assert "not coordinated" not in repr(runtime)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (lambda *given: reversed(given), "type AdamW where the model.*`attach.model, optimizer.`"),
        (lambda model, optimizer: (None, optimizer), "type NoneType where the model"),
        (lambda model, optimizer: (model, [optimizer]), "an optimizer of type list"),
    ],
)
def test_arguments_of_other_types_are_refused_by_name(arguments, named):
    model = peft_model()
    with pytest.raises(StructLoRAError, match=named):
        attach(*arguments(model, adamw(model)), **DATA)


def unsloth_forward(self, x):
    return x


unsloth_forward.__module__ = "unsloth.kernels.fast_lora"
# What Unsloth does to a model -> modules that its kernels compute
UNSLOTH = {
    "a method of the block": (lambda block: setattr(block, "apply_qkv", unsloth_forward), 2),
    "the forward of PEFT's class": (
        lambda block: setattr(
            block.q_proj, "__class__", type("Linear", (type(block.q_proj),), {"forward": unsloth_forward})
        ),
        1,
    ),
}


@pytest.mark.parametrize("how", UNSLOTH)
def test_modules_that_unsloths_kernels_compute_have_no_gate(how):
    fuse, count = UNSLOTH[how]
    model = peft_model()
    fuse(model.base_model.model.model.layers[0].self_attn)
    runtime = attach(model, adamw(model), **DATA)
    gated = sum(len(kind.modules) for kind in runtime.kinds) - count
    assert (runtime.quiet, len(runtime.gating)) == ({"fused LoRA kernels": count}, gated)


GIVEN = "in a run with gates.*`attach.model, optimizer, examples=len.dataset., batch_size=16.`.*`gates='off'`"
# What a loop says of its data, and options -> what the error names; None where it is served
OF_A_LOOP = {
    "nothing": ({}, {}, f"examples=None {GIVEN}"),
    "no batch": ({"examples": 64}, {}, f"batch_size=None {GIVEN}"),
    "no examples": ({"batch_size": 8}, {}, f"examples=None {GIVEN}"),
    "endless": ({"examples": float("inf"), "batch_size": 8}, {}, f"examples=inf {GIVEN}"),
    "more at once than there are": ({"examples": 8, "batch_size": 16}, {}, "batch_size=16 and examples=8"),
    "all at once": ({"examples": 16, "batch_size": 16}, {}, None),
    "without gates": ({}, {"gates": "off"}, None),
}


@pytest.mark.parametrize("case", OF_A_LOOP)
def test_a_loop_says_how_many_examples_it_has(case):
    data, options, named = OF_A_LOOP[case]
    model = peft_model()
    if named is None:
        assert bool(attach(model, adamw(model), **data, **options).gating) is (not options)
        return
    with pytest.raises(StructLoRAError, match=f"found {named}"):
        attach(model, adamw(model), **data, **options)
