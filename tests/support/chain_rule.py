"""The chain rule (promise 2): gradients of a real step beside those that autograd finds through the map itself."""

from __future__ import annotations

import math

import torch
from torch.func import functional_call

from structlora_trl import attach
from structlora_trl.core.expert_storage import stack_nodes
from structlora_trl.core.gates import logistic_noise
from tests.support.reference import (
    reference_expected_gate,
    reference_factors,
    reference_kl,
    reference_regularizer,
    reference_weights,
)
from tests.support.tiny import adamw, batch_of, casting, loss_of, step_with, train


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


def reference_gradients(model, family, runtime, latents, noise, batches, clip, autocast=None, scale=1.0):
    """Gradients of latents, logits and Θ by autograd through the map inside the model's graph."""
    config = runtime.config
    names = {id(p): name for name, p in model.named_parameters()}
    leaves, effective, logits, penalty = {}, {}, [], torch.zeros(())
    for m, stacked, part in zip(runtime.maps, latents, noise, strict=True):
        kind = m.kind
        own = {n: p.detach().clone().requires_grad_() for n, p in m.named_parameters()}
        A = [a.detach().clone().requires_grad_() for a in stacked.A]  # of nodes, in the order (depth, expert)
        B = [b.detach().clone().requires_grad_() for b in stacked.B]
        gates, heads = None, None
        for place, (gate, drawn) in enumerate(zip(m.filters, part, strict=True)):
            if gate.logits is None:
                continue
            start = torch.full((1,), config.gate_init).logit()
            mean = reference_expected_gate(start, config.temperature).to(drawn.device)
            multiplier = torch.sigmoid((own[f"filters.{place}.logits"] + drawn) / config.temperature) / mean
            logits.append(own[f"filters.{place}.logits"].expand(gate.shape).flatten())
            if place == 0:
                gates = multiplier
            elif kind.heads:
                heads = multiplier
            else:
                gates = gates * multiplier  # of experts
        theta = {side: own[f"coordinators.{side}.theta"] for side in m.coordinators}
        activation = {"tanh": torch.tanh, "identity": lambda x: x}[config.activation]
        order = [depth * kind.experts + e for e in range(kind.experts) for depth in range(kind.depth_count)]
        A0 = None if m.origin_A is None else [m.origin_A.expand(len(A), -1, -1)[n] for n in order]
        B0 = None if m.origin_B is None else [m.origin_B[n] for n in order]
        Ae, Be = [A[n] for n in order], [B[n] for n in order]  # in the order (expert, depth)
        if config.regularizer != "none":
            updates = {
                side: values if start is None else [x - x0 for x, x0 in zip(values, start, strict=True)]
                for side, values, start in (("A", Ae, A0), ("B", Be, B0))
            }
            L = kind.depth_count
            penalty = penalty + sum(
                reference_regularizer(updates[side][e * L : (e + 1) * L], config.regularizer)
                for side in m.sides
                for e in range(kind.experts)
            )
        if heads is not None:
            side, count = kind.heads
            width = len(Be[0]) if side == "B" else Ae[0].shape[1]
            spread = heads[order].repeat_interleave(width // count, 1)
            if side == "A":
                Ae = [a * of_width for a, of_width in zip(Ae, spread, strict=True)]
            else:
                Be = [b * of_width[:, None] for b, of_width in zip(Be, spread, strict=True)]
        weights = reference_weights(m.graph.edges, kind.experts > 1 and config.edges != "similarity")
        A1, B1 = reference_factors(
            Ae,
            Be,
            A0,
            B0,
            None if gates is None else gates[order],
            weights,
            theta,
            activation,
            gates_everything=not kind.A,
        )
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
        torch.manual_seed(seed)
        with casting(model, autocast):
            output = functional_call(model, effective, kwargs=batch_of(model, family, seed))
        total = total + output.loss / len(batches)
    if clip is not None:  # the task's gradient is clipped where the model computes; penalties join after that
        of_effective = torch.autograd.grad(total, list(effective.values()), retain_graph=True)
        total = total * clip / torch.cat([g.flatten() for g in of_effective]).norm()
    total = total + config.regularizer_weight * penalty
    total = total + (config.kl_weight * reference_kl(torch.cat(logits), config.prior) if logits else 0.0)
    (scale * total).backward()  # as a GradScaler does it: in fp16, small gradients vanish without
    for A, B, own in leaves.values():
        for leaf in (*A, *B, *own.values()):
            if leaf.grad is not None:
                leaf.grad /= scale
    return leaves


def runtime_gradients(model, family, runtime, optimizer, batches, clip, autocast=None, scaler=None):
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

    optimizer.register_step_pre_hook(look)
    model.train()
    for seed in batches:
        torch.manual_seed(seed)
        loss = loss_of(model, family, seed, autocast) / len(batches)
        (loss if scaler is None else scaler.scale(loss)).backward()
    if clip is not None:
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), clip) > 2 * clip
    step_with(optimizer, scaler)
    return seen


def relative_error(ours, theirs) -> float:
    ours, theirs = (torch.cat([t.float().flatten() for t in tensors]) for tensors in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()


def assert_chain_rule(
    model,
    family,
    batches=(0,),
    tolerance=1e-5,
    reentrant=None,
    clip=None,
    autocast=None,
    scaler=None,
    **options,
) -> float:
    """Compare the gradients that reach latents, logits and Θ, kind by kind; the largest relative error."""
    optimizer = adamw(model)
    runtime = attach(model, optimizer, **options)
    randomise(runtime)
    # Away from A - A0 = 0.
    train(model, family, optimizer, steps=2, first=50, autocast=autocast, scaler=scaler)
    latents = [f._replace(A=f.A.clone(), B=f.B.clone()) for f in runtime.engine.read_latents()]
    shapes = [gate.shape for m in runtime.maps for gate in m.filters]
    counts = [math.prod(shape) for shape in shapes]
    draw = logistic_noise(sum(counts), runtime.seed, runtime.step).split(counts)
    drawn = iter(part.view(shape) for part, shape in zip(draw, shapes, strict=True))
    noise = [[next(drawn).to(m.kind.device) for _ in m.filters] for m in runtime.maps]
    scale = 1.0 if scaler is None else scaler.get_scale()
    expected = reference_gradients(model, family, runtime, latents, noise, batches, clip, autocast, scale)
    if reentrant is not None:  # after the reference, whose graph reentrant checkpointing would cut
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = runtime_gradients(model, family, runtime, optimizer, batches, clip, autocast, scaler)
    errors = {}
    for name, (A, B, own) in expected.items():
        ours_A, ours_B, ours_own = found[name]
        grads = lambda tensors: [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]  # noqa: E731
        if len(ours_A):  # else frozen
            errors[f"lora_A of {name}"] = relative_error(ours_A, grads(A))
        errors[f"lora_B of {name}"] = relative_error(ours_B, grads(B))
        for parameter, tensor in own.items():
            assert ours_own[parameter].abs().sum() > 0
            errors[f"{parameter} of {name}"] = relative_error([ours_own[parameter]], grads([tensor]))
    wrong = {what: error for what, error in errors.items() if not error <= tolerance}
    assert not wrong, wrong
    return max(errors.values())
