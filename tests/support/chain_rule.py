"""The chain rule (promise 2): gradients of a real step beside those that autograd finds through the map itself."""

from __future__ import annotations

import torch
from torch.func import functional_call

from structlora_trl import attach
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
                semantic[..., 0, 2] = semantic[..., 2, 0] = True
                m.graph.load_state_dict({"semantic": semantic})


def reference_gradients(model, family, runtime, latents, noise, batches, clip, autocast=None, scale=1.0):
    """Gradients of latents, logits and Θ by autograd through the map inside the model's graph."""
    config = runtime.config
    names = {id(p): name for name, p in model.named_parameters()}
    leaves, effective, logits, penalty = {}, {}, [], torch.zeros(())
    for m, stacked, part in zip(runtime.maps, latents, noise, strict=True):
        kind = m.kind
        own = {n: p.detach().clone().requires_grad_() for n, p in m.named_parameters()}
        A = [a.detach().clone().requires_grad_() for a in stacked.A]
        B = [b.detach().clone().requires_grad_() for b in stacked.B]
        A0 = None if m.origin_A is None else m.origin_A.expand(len(kind.modules), -1, -1)
        gates = None
        if m.filter.logits is not None:
            start = torch.full((1,), config.gate_init).logit()
            mean = reference_expected_gate(start, config.temperature).to(part.device)
            gates = torch.sigmoid((own["filter.logits"] + part[..., : kind.rank]) / config.temperature) / mean
            logits.append(own["filter.logits"].expand(m.filter.shape).flatten())
            if m.groups is not None:
                groups = torch.sigmoid((own["groups.logits"] + part[..., kind.rank :]) / config.temperature) / mean
                logits.append(own["groups.logits"].expand(m.groups.shape).flatten())
                if m.heads is None:  # of experts
                    gates = gates * groups
        theta = {side: own[f"coordinators.{side}.theta"] for side in m.coordinators}
        activation = {"tanh": torch.tanh, "identity": lambda x: x}[config.activation]
        factors = []  # of each expert and depth: A, B, A0, B0
        for e in range(kind.experts):
            if kind.per_depth > 1:  # modules in the order (depth, expert)
                Ae, Be = A[e :: kind.per_depth], B[e :: kind.per_depth]
                Ae0, Be0 = (t if t is None else t[e :: kind.per_depth] for t in (A0, m.origin_B))
            else:
                rows, columns = slice(e * kind.rank, (e + 1) * kind.rank), slice(e, None, kind.experts)
                Ae, Be = [a[rows] for a in A], [b[:, columns] for b in B]
                Ae0, Be0 = A0 if A0 is None else A0[:, rows], None if m.origin_B is None else m.origin_B[:, :, columns]
            if config.regularizer != "none":
                updates = {"A": Ae if Ae0 is None else [a - a0 for a, a0 in zip(Ae, Ae0, strict=True)], "B": Be}
                penalty = penalty + sum(reference_regularizer(updates[side], config.regularizer) for side in m.sides)
            if m.heads is not None:
                width = len(Be[0]) if m.heads.side == "B" else Ae[0].shape[1]
                spread = groups.repeat_interleave(width // m.heads.count, 1)
                if m.heads.side == "A":
                    Ae = [a * of_width for a, of_width in zip(Ae, spread, strict=True)]
                else:
                    Be = [b * of_width[:, None] for b, of_width in zip(Be, spread, strict=True)]
            factors.append((Ae, Be, Ae0, Be0))
        Ae, Be, Ae0, Be0 = (
            None if parts[0] is None else [x for part in parts for x in part] for parts in zip(*factors, strict=True)
        )
        edges = m.graph.edges if kind.experts > 1 else m.graph.edges[None]
        weights = reference_weights(edges, kind.experts > 1 and config.edges != "similarity")
        A1, B1 = reference_factors(
            Ae, Be, Ae0, Be0, None if gates is None else gates.flatten(0, -2), weights, theta, activation
        )
        A1, B1 = ([nodes[depth :: kind.depth_count] for depth in range(kind.depth_count)] for nodes in (A1, B1))
        if kind.per_depth > 1:
            A1, B1 = ([node for of_depth in nodes for node in of_depth] for nodes in (A1, B1))
        else:
            A1 = [torch.cat(of_depth) for of_depth in A1]  # rows (expert, r)
            B1 = [torch.stack(of_depth, -1).flatten(1) for of_depth in B1]  # columns (r, expert)
        for parameters, values in ((kind.A, A1), (kind.B, B1)):
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
            seen[m.kind.name] = (
                [p.grad.clone() for p in m.kind.A if p.requires_grad],
                [p.grad.clone() for p in m.kind.B],
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
    model, family, batches=(0,), tolerance=1e-5, reentrant=None, clip=None, autocast=None, scaler=None, **options
) -> float:
    """Compare the gradients that reach latents, logits and Θ, kind by kind; the largest relative error."""
    optimizer = adamw(model)
    runtime = attach(model, optimizer, **options)
    randomise(runtime)
    train(model, family, optimizer, steps=2, first=50, autocast=autocast, scaler=scaler)  # away from A - A0 = 0
    latents = [f._replace(A=f.A.clone(), B=f.B.clone()) for f in runtime.engine.read_latents()]
    draw = logistic_noise(sum(m.gate_count for m in runtime.maps), runtime.seed, runtime.step)
    parts = draw.split([m.gate_count for m in runtime.maps])
    noise = [part.view(m.noise_shape).to(m.kind.device) for m, part in zip(runtime.maps, parts, strict=True)]
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
        if ours_A:  # else frozen
            errors[f"lora_A of {name}"] = relative_error(ours_A, grads(A))
        errors[f"lora_B of {name}"] = relative_error(ours_B, grads(B))
        for parameter, tensor in own.items():
            assert ours_own[parameter].abs().sum() > 0
            errors[f"{parameter} of {name}"] = relative_error([ours_own[parameter]], grads([tensor]))
    wrong = {what: error for what, error in errors.items() if not error <= tolerance}
    assert not wrong, wrong
    return max(errors.values())
