"""The design's promises, on every model family: identity at attach (1), chain rule (2), export (5), off is off (6)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.func import functional_call

from structlora_trl import attach
from structlora_trl.core.gates import logistic_noise
from tests.support.launching import ROOT
from tests.support.reference import reference_expected_gate, reference_factors, reference_kl, reference_regularizer
from tests.support.setups import quantised
from tests.support.tiny import (
    FAMILIES,
    adamw,
    base_model,
    inits,
    logits_of,
    lora_parameters,
    loss_of,
    peft_model,
    train,
    warm_up,
)

FP32, BF16 = torch.float32, torch.bfloat16

# family, init, all linear modules, dropout, dtype
CASES = [
    *((family, init, False, 0.0, FP32) for family in FAMILIES for init in inits(family)),
    *((family, "warm", True, 0.1, FP32) for family in FAMILIES),
    *((family, "warm", False, 0.0, BF16) for family in FAMILIES),
    ("llama", "dora", True, 0.1, BF16),
    ("llama", "rslora", True, 0.1, BF16),
]


def case_model(family, init, all_linear, dropout, dtype):
    targets = FAMILIES[family].linear if all_linear else None
    return peft_model(family, init, targets=targets, dropout=dropout, dtype=dtype)


@pytest.fixture(params=CASES, ids=lambda c: "-".join(map(str, c)).replace("torch.", ""))
def case(request):
    return request.param


def randomise(runtime):
    """Parts that start at zero hide mistakes: give Θ values and the graph semantic edges."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for m in runtime.maps:
            for parameter in m.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            if m.kind.depth_count > 2:
                semantic = torch.zeros_like(m.graph.fixed)
                semantic[..., 0, 2] = semantic[..., 2, 0] = True
                m.graph.load_state_dict({"semantic": semantic})


def test_attaching_changes_no_output(case):
    family = case[0]
    model = case_model(*case)
    before = logits_of(model, family)
    attach(model, adamw(model))
    assert (logits_of(model, family) - before).abs().max() <= 1e-6


def reference_gradients(model, family, runtime, latents, noise, batches, clip):
    """Gradients of latents, logits and Θ by autograd through the map inside the model's graph."""
    config = runtime.config
    names = {id(p): name for name, p in model.named_parameters()}
    leaves, effective, logits, penalty = {}, {}, [], torch.zeros(())
    for m, stacked, part in zip(runtime.maps, latents, noise, strict=True):
        kind = m.kind
        own = {n: p.detach().clone().requires_grad_() for n, p in m.named_parameters()}
        A = [a.detach().clone().requires_grad_() for a in stacked.A]
        B = [b.detach().clone().requires_grad_() for b in stacked.B]
        A0 = None if m.origin_A is None else m.origin_A.expand(kind.depth_count, -1, -1)
        gates = None
        if m.filter.logits is not None:
            start = torch.full((1,), config.gate_init).logit()
            sample = torch.sigmoid((own["filter.logits"] + part) / config.temperature)
            gates = sample / reference_expected_gate(start, config.temperature)
            logits.append(own["filter.logits"].expand(m.filter.shape).flatten())
        theta = {side: own[f"coordinators.{side}.theta"] for side in m.coordinators}
        activation = {"tanh": torch.tanh, "identity": lambda x: x}[config.activation]
        experts = []
        for e in range(kind.experts):
            rows, columns = slice(e * kind.rank, (e + 1) * kind.rank), slice(e, None, kind.experts)
            Ae, Be = [a[rows] for a in A], [b[:, columns] for b in B]
            Ae0 = None if A0 is None else A0[:, rows]
            Be0 = None if m.origin_B is None else m.origin_B[:, :, columns]
            if config.regularizer != "none":
                updates = {"A": Ae if Ae0 is None else [a - a0 for a, a0 in zip(Ae, Ae0, strict=True)], "B": Be}
                penalty = penalty + sum(reference_regularizer(updates[side], config.regularizer) for side in m.sides)
            own_gates, edges = (t if t is None or kind.experts == 1 else t[e] for t in (gates, m.graph.edges))
            experts.append(reference_factors(Ae, Be, Ae0, Be0, own_gates, edges, theta, activation))
        A1 = [torch.cat(of_depth) for of_depth in zip(*(A for A, _ in experts), strict=True)]  # rows (expert, r)
        B1 = [
            torch.stack(of_depth, -1).flatten(1) for of_depth in zip(*(B for _, B in experts), strict=True)
        ]  # columns (r, expert)
        for parameters, values in ((kind.A, A1), (kind.B, B1)):
            for p, value in zip(parameters, values, strict=True):
                effective[names[id(p)]] = value.view_as(p).to(p.dtype)
        leaves[kind.name] = (A, B, own)
    total = 0.0
    for seed in batches:
        torch.manual_seed(seed)
        total = total + functional_call(model, effective, kwargs=FAMILIES[family].batch(seed)).loss / len(batches)
    if clip is not None:  # the task's gradient is clipped where the model computes; penalties join after that
        of_effective = torch.autograd.grad(total, list(effective.values()), retain_graph=True)
        total = total * clip / torch.cat([g.flatten() for g in of_effective]).norm()
    total = total + config.regularizer_weight * penalty
    total = total + (config.kl_weight * reference_kl(torch.cat(logits), config.prior) if logits else 0.0)
    total.backward()
    return leaves


def runtime_gradients(model, family, runtime, optimizer, batches, clip):
    """Gradients as the optimizers meet them in a real step."""
    seen = {}

    def look(*_):
        for m in runtime.maps:
            seen[m.kind.name] = (
                [p.grad.clone() for p in m.kind.A if p.requires_grad],
                [p.grad.clone() for p in m.kind.B],
                {n: p.grad.clone() for n, p in m.named_parameters()},
            )

    optimizer.register_step_pre_hook(look)
    model.train()
    for seed in batches:
        torch.manual_seed(seed)
        (loss_of(model, family, seed) / len(batches)).backward()
    if clip is not None:
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), clip) > 2 * clip
    optimizer.step()
    return seen


def relative_error(ours, theirs) -> float:
    ours, theirs = (torch.cat([t.float().flatten() for t in tensors]) for tensors in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()


def assert_chain_rule(model, family, batches=(0,), tolerance=1e-5, reentrant=None, clip=None, **options):
    optimizer = adamw(model)
    runtime = attach(model, optimizer, **options)
    randomise(runtime)
    train(model, family, optimizer, steps=2, first=50)  # away from A - A0 = 0
    latents = [f._replace(A=f.A.clone(), B=f.B.clone()) for f in runtime.engine.read_latents()]
    draw = logistic_noise(sum(m.gate_count for m in runtime.maps), runtime.seed, runtime.step)
    parts = draw.split([m.gate_count for m in runtime.maps])
    noise = [part.view(m.filter.shape) for m, part in zip(runtime.maps, parts, strict=True)]
    expected = reference_gradients(model, family, runtime, latents, noise, batches, clip)
    if reentrant is not None:  # after the reference, whose graph reentrant checkpointing would cut
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = runtime_gradients(model, family, runtime, optimizer, batches, clip)
    for name, (A, B, own) in expected.items():
        ours_A, ours_B, ours_own = found[name]
        grads = lambda tensors: [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]  # noqa: E731
        if ours_A:  # else frozen
            assert relative_error(ours_A, grads(A)) <= tolerance, f"lora_A of {name}"
        assert relative_error(ours_B, grads(B)) <= tolerance, f"lora_B of {name}"
        for parameter, tensor in own.items():
            assert ours_own[parameter].abs().sum() > 0
            assert relative_error([ours_own[parameter]], grads([tensor])) <= tolerance, f"{parameter} of {name}"


def test_chain_rule(case):
    assert_chain_rule(case_model(*case), case[0], tolerance=1e-5 if case[-1] is FP32 else 3e-2)


OPTIONS = [
    {"side": "both"},
    {"side": "write", "activation": "identity"},
    {"coordinator_layers": 3},
    {"share_gates": True},
    {"filter": "none"},
    {"coordinator": "none"},
    {"edges": "similarity"},
    {"regularizer": "cosine", "side": "both"},
    {"regularizer": "laplacian", "regularizer_weight": 0.5},
]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_chain_rule_of_every_switch(options, family):
    assert_chain_rule(peft_model(family, "warm", targets=FAMILIES[family].linear), family, **options)


@pytest.mark.parametrize("regularizer", ["none", "laplacian"])
def test_chain_rule_with_clipping(regularizer):
    assert_chain_rule(peft_model("llama", "warm"), "llama", clip=0.01, tolerance=2e-5, regularizer=regularizer)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_chain_rule_with_accumulation_and_checkpointing(reentrant):
    model = peft_model("llama", "warm", dropout=0.1)
    assert_chain_rule(model, "llama", batches=(0, 1, 2, 3), reentrant=reentrant)


def test_chain_rule_on_a_4_bit_base():
    pytest.importorskip("bitsandbytes")
    model = get_peft_model(quantised(4), LoraConfig(r=4, target_modules=FAMILIES["llama"].linear))
    warm_up(model)
    model.gradient_checkpointing_disable()  # it would cut the reference's graph
    assert_chain_rule(model, "llama")


def test_chain_rule_with_lora_A_frozen():
    model = peft_model("llama", "warm", targets=FAMILIES["llama"].linear)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    assert_chain_rule(model, "llama", side="write")


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("family", FAMILIES)
def test_off_is_plain_lora_bit_for_bit(family, dtype):
    def trajectory(structlora: bool):
        model = peft_model(family, dropout=0.1, dtype=dtype, targets=FAMILIES[family].linear)
        optimizer = adamw(model)
        if structlora:
            attach(model, optimizer, filter="none", coordinator="none")
        return train(model, family, optimizer, steps=4), [p.detach().clone() for p in lora_parameters(model).values()]

    losses, weights = trajectory(False)
    our_losses, our_weights = trajectory(True)
    assert losses == our_losses
    assert all(map(torch.equal, weights, our_weights))


@pytest.mark.parametrize("family, init", [(family, init) for family in FAMILIES for init in inits(family)])
def test_saved_adapter_is_plain_peft(family, init, tmp_path):
    model = peft_model(family, init, targets=FAMILIES[family].linear)
    optimizer = adamw(model)
    runtime = attach(model, optimizer, semantic_every=2)
    train(model, family, optimizer, steps=4)
    trained = logits_of(model, family)
    model.train()
    runtime.train()  # saved amid a step: evaluation weights all the same
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(family), tmp_path)
    # PiSSA's base weights are recomputed by an SVD at load, which costs a few more digits.
    assert (logits_of(loaded, family) - trained).abs().max() <= (1e-5 if init == "pissa" else 1e-6)
    runtime.detach()
    assert (logits_of(model, family) - trained).abs().max() == 0
    assert (logits_of(model.merge_and_unload(), family) - trained).abs().max() <= 1e-5


def test_saved_adapter_loads_where_this_package_is_not(tmp_path):
    model = peft_model()
    optimizer = adamw(model)
    attach(model, optimizer)
    train(model, "llama", optimizer, steps=3)
    model.save_pretrained(tmp_path)
    torch.save(logits_of(model, "llama"), tmp_path / "logits.pt")
    script = """
import sys, torch
sys.modules["structlora_trl"] = None
from peft import LoraConfig, PeftModel, get_peft_model
from tests.support.tiny import base_model, logits_of
loaded = PeftModel.from_pretrained(base_model("llama"), sys.argv[1])
difference = (logits_of(loaded, "llama") - torch.load(sys.argv[1] + "/logits.pt")).abs().max().item()
assert difference <= 1e-6, difference
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=ROOT)


def test_training_moves_latents_gates_and_theta():
    model = peft_model(targets=FAMILIES["llama"].linear)
    optimizer = adamw(model)
    runtime = attach(model, optimizer)
    before = {name: value.clone() for name, value in runtime.state_dict().items()}
    train(model, "llama", optimizer, steps=3)
    after = runtime.state_dict()
    for name, value in before.items():
        if name.endswith(("latent_A", "latent_B", "logits", "theta")):
            assert not torch.equal(value, after[name]), name
