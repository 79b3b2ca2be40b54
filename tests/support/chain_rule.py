"""The chain rule (promise 2): gradients of a real step beside those that autograd finds through the map itself."""

from __future__ import annotations

import torch
from torch.func import functional_call

from structlora_trl import attach
from structlora_trl.core.expert_storage import stack_nodes
from tests.support.reference import reference_factors, reference_weights
from tests.support.tiny import adamw, batch_of, casting, latents_of, loss_of, step_with, train


def randomise(runtime):
    """Parts that start at zero hide mistakes: give Θ values and the graph semantic edges."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for m in runtime.maps:
            for parameter in m.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
            if m.kind.depth_count > 2:
                semantic = torch.zeros_like(m.graph.fixed)
                semantic[:, 0, 2] = semantic[:, 2, 0] = True
                m.graph.load_state_dict({"semantic": semantic})


def reference_gradients(model, family, runtime, latents, batches, autocast=None, scale=1.0):
    """Gradients of latents, Θ and the gates' logits by autograd through the map inside the model's graph."""
    names = {id(p): name for name, p in model.named_parameters()}
    leaves, effective = {}, {}
    for m, stacked in zip(runtime.maps, latents, strict=True):
        kind = m.kind
        own = {n: p.detach().clone().requires_grad_() for n, p in m.named_parameters()}
        A = [a.detach().clone().requires_grad_() for a in stacked.A]  # of nodes, in the order (depth, expert)
        B = [b.detach().clone().requires_grad_() for b in stacked.B]
        theta = {side: own[f"coordinators.{side}.theta"] for side in m.coordinators}
        order = [depth * kind.experts + e for e in range(kind.experts) for depth in range(kind.depth_count)]
        A0 = None if m.origin_A is None else [m.origin_A.expand(len(A), -1, -1)[n] for n in order]
        B0 = None if m.origin_B is None else [m.origin_B[n] for n in order]
        weights = reference_weights(m.graph.edges, kind.experts > 1 and runtime.config.edges != "similarity")
        A1, B1 = reference_factors([A[n] for n in order], [B[n] for n in order], A0, B0, weights, theta)
        back = torch.tensor(order).argsort().tolist()
        A1, B1 = ([nodes[n] for n in back] for nodes in (A1, B1))
        E = kind.adapted.experts
        if E > 1:  # in one parameter: rows (expert, r), columns (r, expert)
            A1 = [torch.cat(A1[i : i + E]) for i in range(0, len(A1), E)]
            B1 = [torch.stack(B1[i : i + E], -1).flatten(1) for i in range(0, len(B1), E)]
        for parameters, values in ((kind.A, A1), (kind.B, B1)) if kind.A else ((kind.B, B1),):
            for p, value in zip(parameters, values, strict=True):
                effective[names[id(p)]] = value.view_as(p).to(p.dtype)
        leaves[kind.name] = (A, B, own)
    total = 0.0
    for seed in batches:
        torch.manual_seed(seed)  # of dropout and gates
        with casting(model, autocast):
            output = functional_call(model, effective, kwargs=batch_of(model, family, seed))
        total = total + output.loss / len(batches)
    (scale * total).backward()  # as a GradScaler does it: in fp16, small gradients vanish without
    for A, B, own in leaves.values():
        for leaf in (*A, *B, *own.values()):
            if leaf.grad is not None:
                leaf.grad /= scale
    return leaves, _gradients_of_gates(runtime, scale)


def _gradients_of_gates(runtime, scale):
    gates = runtime.gating.gates.items()
    found = {name: gradient / scale for (name, gate) in gates for gradient in gradients([gate.logits])}
    for _, gate in gates:
        gate.logits.grad = None
    return found


def runtime_gradients(model, family, runtime, optimizer, batches, autocast=None, scaler=None):
    """Gradients as the optimizers meet them in a real step."""
    seen = {}

    def look(*_):
        for m in runtime.maps:
            A, B = (
                stack_nodes([p.grad for p in parameters], side, m.kind)
                if parameters and parameters[0].requires_grad
                else ()
                for side, parameters in (("A", m.kind.A), ("B", m.kind.B))
            )
            seen[m.kind.name] = (
                [a.clone() for a in A],
                [b.clone() for b in B],
                {n: p.grad.clone() for n, p in m.named_parameters()},
            )
        seen["gates"] = runtime.gating._taken[0].clone() if runtime.gating else None

    optimizer.register_step_pre_hook(look)
    model.train()
    for seed in batches:
        torch.manual_seed(seed)
        loss = loss_of(model, family, seed, autocast) / len(batches)
        (loss if scaler is None else scaler.scale(loss)).backward()
    step_with(optimizer, scaler)
    return seen


def relative_error(ours, theirs) -> float:
    ours, theirs = (torch.cat([t.float().flatten() for t in tensors]) for tensors in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()


def gradients(leaves) -> list[torch.Tensor]:
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def assert_chain_rule(
    model,
    family,
    batches=(0,),
    tolerance=1e-5,
    reentrant=None,
    autocast=None,
    scaler=None,
    **options,
) -> float:
    """Compare the gradients that reach latents, Θ and the gates, kind by kind; the largest relative error."""
    optimizer = adamw(model)
    runtime = attach(model, optimizer, examples=64, batch_size=8, scaler=scaler, **options)
    randomise(runtime)
    # Away from A - A0 = 0.
    train(model, family, optimizer, steps=2, first=50, autocast=autocast, scaler=scaler)
    latents = latents_of(runtime)
    scale = 1.0 if scaler is None else scaler.get_scale()
    expected, of_gates = reference_gradients(model, family, runtime, latents, batches, autocast, scale)
    if reentrant is not None:  # after the reference, whose graph reentrant checkpointing would cut
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = runtime_gradients(model, family, runtime, optimizer, batches, autocast, scaler)
    errors = {}
    for name, (A, B, own) in expected.items():
        ours_A, ours_B, ours_own = found[name]
        if len(ours_A):  # else frozen
            errors[f"lora_A of {name}"] = relative_error(ours_A, gradients(A))
        errors[f"lora_B of {name}"] = relative_error(ours_B, gradients(B))
        for parameter, tensor in own.items():
            assert ours_own[parameter].abs().sum() > 0
            errors[f"{parameter} of {name}"] = relative_error([ours_own[parameter]], gradients([tensor]))
    if of_gates:
        errors["gates"] = relative_error([found["gates"]], list(of_gates.values()))
        assert found["gates"].abs().sum() > 0
    wrong = {what: error for what, error in errors.items() if not error <= tolerance}
    assert not wrong, wrong
    return max(errors.values())
