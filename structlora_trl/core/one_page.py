"""StructLoRA on one page: the default method as a plain loop, for one process in fp32. Read this first.

Nothing in the package imports this file. It does what `attach` does with default options (learned gates with
noise, KL, a graph network with semantic edges, the pullback), without engines, saving or checks, and a test
holds it equal to the package. Shapes: a kind has L depths; A is (L, r, k), B is (L, d, r), and ΔW = s·B·A at
each depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..config import StructLoRAConfig
from .gates import expected_gate, kl_gradient, logistic_noise, logit, sample_gates
from .graph import adjacency_edges, normalize_edges, semantic_edges
from .kinds import Kind, discover, residual_side

Latent = tuple[Tensor, Tensor]
"""Latent factors (A, B) of one kind: what the optimizer steps."""


class Map(nn.Module):
    """From latent to effective factors of one kind: gates, then message passing over depth."""

    def __init__(self, A: Tensor, side: str, config: StructLoRAConfig):
        super().__init__()
        depths, rank, _ = A.shape
        self.A0, self.side, self.config = A.clone(), side, config
        self.phi = nn.Parameter(A.new_full((depths, rank), logit(config.gate_init)))  # gate logits
        # m₀, so that the mean gate starts at 1.
        self.start = expected_gate(self.phi.detach(), config.temperature)
        self.theta = nn.Parameter(A.new_zeros(rank, rank))  # zero: message passing starts as the identity
        self.edges = adjacency_edges(depths)
        self.mean: Tensor | None = None  # running-mean gradient, (L, n)

    def forward(self, A: Tensor, B: Tensor, noise: Tensor | None) -> Latent:
        """Effective factors: with noisy gates in training, with their mean where `noise` is None."""
        tau = self.config.temperature
        gates = expected_gate(self.phi, tau) if noise is None else sample_gates(self.phi, noise, tau)
        B = B * (gates / self.start)[:, None, :]
        h = A - self.A0 if self.side == "A" else B.mT  # what is comparable across depth, (L, r, n)
        messages = torch.einsum("lm,mrn->lrn", normalize_edges(self.edges), h)
        added = torch.tanh(self.theta.T @ messages)
        return (A + added, B) if self.side == "A" else (A, B + added.mT)

    def observe(self, gradient: Tensor) -> None:
        """Take a step's gradient of the compared side into the running mean."""
        flat = gradient.flatten(1)
        self.mean = (
            flat.clone() if self.mean is None else self.mean.lerp(flat, 1 - self.config.semantic_decay)
        )

    def redraw(self) -> None:
        """Join depths whose running-mean gradients point the same way, beside neighbours."""
        near, c = adjacency_edges(len(self.phi)), self.config
        self.edges = near | semantic_edges(
            self.mean @ self.mean.T, c.semantic_top_k, c.semantic_threshold, near
        )


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Iterable[Callable[[], Tensor]],
    config: StructLoRAConfig,
    seed: int = 42,
) -> None:
    """Train a fresh LoRA adapter as StructLoRA; the model ends with the evaluation weights, plain LoRA.

    Args:
        model (`nn.Module`): a PEFT model with a LoRA adapter 'default' whose lora_B is zero.
        optimizer (`torch.optim.Optimizer`): steps its LoRA parameters, at a constant learning rate.
        losses (`Iterable`): for each step, a function that computes the loss.
        config (`StructLoRAConfig`): the options of gates and coordinator; all else is at its default.
        seed (`int`, *optional*, defaults to 42): of the gates' noise.
    """
    kinds = discover(model, "default")
    latents: list[Latent] = [
        (torch.stack([kind.A[0].detach()] * kind.depth_count), _stack(kind.B)) for kind in kinds
    ]
    maps = [Map(A, residual_side(kind, None), config) for kind, (A, _) in zip(kinds, latents, strict=True)]
    counts = [m.phi.numel() for m in maps]
    own = torch.optim.AdamW(
        [
            {"params": [m.phi for m in maps], "lr": config.gate_lr, "eps": 1e-8 / sum(counts)},
            {"params": [m.theta for m in maps], "lr": config.coordinator_lr},
        ],
        weight_decay=0.0,
    )
    for step, loss in enumerate(losses):
        # 1. Noise is drawn, and training weights are written into the model.
        drawn = logistic_noise(sum(counts), seed, step).split(counts)
        noise = [part.view_as(m.phi) for part, m in zip(drawn, maps, strict=True)]
        with torch.no_grad():
            _write(kinds, [m(*latent, part) for m, latent, part in zip(maps, latents, noise, strict=True)])
        # 2. Forward and backward are those of plain LoRA.
        loss().backward()
        # 3. The gradients are pulled back through the map, by one vector-Jacobian product.
        for m, kind, latent, part in zip(maps, kinds, latents, noise, strict=True):
            gradient = [torch.stack([p.grad for p in parameters]) for parameters in (kind.A, kind.B)]
            leaves = [factor.requires_grad_() for factor in latent]
            effective = m(*leaves, part)
            *pulled, phi, theta = torch.autograd.grad(effective, [*leaves, m.phi, m.theta], gradient)
            m.phi.grad = phi + config.kl_weight / sum(counts) * kl_gradient(m.phi.detach(), config.prior)
            m.theta.grad = theta
            m.observe(gradient[0 if m.side == "A" else 1])
            for parameters, values in zip((kind.A, kind.B), pulled, strict=True):
                for parameter, value in zip(parameters, values, strict=True):
                    parameter.grad.copy_(value)
        # 4. The optimizer steps the latent factors, a small AdamW the gates and Θ.
        _write(kinds, latents)
        optimizer.step()
        latents = [(_stack(kind.A), _stack(kind.B)) for kind in kinds]
        own.step()
        optimizer.zero_grad()
        if (step + 1) % config.semantic_every == 0:
            for m in maps:
                m.redraw()
    # 5. Evaluation weights are written: no noise.
    with torch.no_grad():
        _write(kinds, [m(*latent, None) for m, latent in zip(maps, latents, strict=True)])


def _stack(parameters: list[nn.Parameter]) -> Tensor:
    return torch.stack([p.detach() for p in parameters])


@torch.no_grad()
def _write(kinds: list[Kind], factors: list[Latent]) -> None:
    """Put factors where the model reads them."""
    for kind, pair in zip(kinds, factors, strict=True):
        for parameters, values in zip((kind.A, kind.B), pair, strict=True):
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
