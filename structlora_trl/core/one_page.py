"""StructLoRA on one page: the default method as a plain loop, for one process in fp32. Read this first.

Nothing in the package imports this file. It does what `attach` does with default options (gates that learn, a
graph network with semantic edges, the pullback), without engines, saving or checks, and a test holds it equal
to the package. Shapes: a kind has L depths; A is (L, r, k), B is (L, d, r), and ΔW = s·B·A at each depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..config import StructLoRAConfig
from .gates import LARGEST_STEP, LOGITS
from .graph import DepthGraph, adjacency_edges, normalize_edges, semantic_edges
from .kinds import discover, residual_side


class Gate:
    """A hook on lora_A: y = W x + s·B (m ⊙ A x), in training; m has mean one and is drawn for each example."""

    def __init__(self, rank: int, openness: float):
        # One logit θ for each direction: openness σ(θ) = 1 / (1 + α), with α the variance of m.
        self.logits = torch.full((rank,), math.log(openness / (1 - openness))).requires_grad_()

    def __call__(self, lora_A: nn.Module, _, activations: Tensor) -> Tensor:
        if not lora_A.training:
            return activations
        shape = (len(activations), *[1] * (activations.dim() - 2), activations.shape[-1])
        return activations * (1 + torch.exp(-self.logits / 2) * torch.randn(shape))

    @torch.no_grad()
    def step(self, examples: int, batch_size: int, beta: float, lr: float) -> None:
        """Descend N·loss + β·Σ ½ log(1 + 1/α), at a rate per epoch."""
        gradient = examples * self.logits.grad + beta * torch.sigmoid(self.logits) / 2
        gradient = gradient.clamp(max=beta / 2)  # a gate closes no faster than by the price of an open one
        self.logits -= (lr * batch_size / examples * gradient).clamp(min=-LARGEST_STEP)
        self.logits.clamp_(*LOGITS)
        self.logits.grad = None


class Coordinator(nn.Module):
    """From latent to effective factors of one kind, on the side that is comparable across depth.

    The model holds the effective ones; the latent ones are these less an offset.
    """

    def __init__(self, parameters: list[nn.Parameter], side: str, config: StructLoRAConfig):
        super().__init__()
        self.factors, self.side, self.config = parameters, side, config  # A (L, r, k), or B (L, d, r)
        self.offset = torch.zeros_like(self.standing())
        self.origin = self.standing() if side == "A" else torch.zeros_like(self.standing())
        rank = self.origin.shape[1 if side == "A" else 2]
        self.theta = nn.Parameter(torch.zeros(rank, rank))  # zero: message passing starts as the identity
        self.edges = adjacency_edges(len(parameters))
        self.mean: Tensor | None = None  # running-mean gradient, (L, n)

    def forward(self, latent: Tensor) -> Tensor:
        """h + σ(Â h Θ), with the rank axis first: (L, r, n)."""
        h = latent - self.origin if self.side == "A" else latent.mT
        added = torch.tanh(self.theta.T @ torch.einsum("lm,mrn->lrn", normalize_edges(self.edges), h))
        return latent + (added if self.side == "A" else added.mT)

    def before_step(self) -> None:
        """Pull the gradients back through the map, by one vector-Jacobian product."""
        gradient = torch.stack([p.grad for p in self.factors])
        flat, keep = gradient.flatten(1), 1 - DepthGraph.decay
        self.mean = flat.clone() if self.mean is None else self.mean.lerp(flat, keep)
        leaf = (self.standing() - self.offset).requires_grad_()
        pulled, self.theta.grad = torch.autograd.grad(self(leaf), [leaf, self.theta], gradient)
        for parameter, value in zip(self.factors, pulled, strict=True):
            parameter.grad.copy_(value)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Map what the optimizer made."""
        if step % DepthGraph.redraw_every == 0:  # join depths whose gradients point the same way
            near, c = adjacency_edges(len(self.factors)), self.config
            gram = self.mean @ self.mean.T
            self.edges = near | semantic_edges(gram, c.semantic_top_k, c.semantic_threshold, near)
        latent = self.standing() - self.offset
        effective = self(latent)
        for parameter, value in zip(self.factors, effective, strict=True):
            parameter.copy_(value)
        self.offset = effective - latent

    def standing(self) -> Tensor:
        return torch.stack([p.detach() for p in self.factors])


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Iterable[Callable[[], Tensor]],
    config: StructLoRAConfig,
    examples: int,
    batch_size: int,
) -> None:
    """Train a fresh LoRA adapter as StructLoRA; between steps, and at the end, the model holds plain LoRA.

    Args:
        model (`nn.Module`): a PEFT model with a LoRA adapter 'default' whose lora_B is zero.
        optimizer (`torch.optim.Optimizer`): steps its LoRA parameters, at a constant learning rate.
        losses (`Iterable`): for each step, a function that computes the loss.
        config (`StructLoRAConfig`): the options of gates and coordinator; all else is at its default.
        examples (`int`): N, the number of training examples.
        batch_size (`int`): of a step.
    """
    gates = []
    kinds = discover(model, "default")
    for kind in kinds:
        for module, A in zip(kind.modules, kind.A, strict=True):
            A.data.copy_(kind.A[0].data)  # one lora_A for all depths of a kind
            if config.gates != "off":
                gates.append(Gate(kind.rank, config.gate_openness))
                model.get_submodule(f"{module}.lora_A.default").register_forward_hook(gates[-1])
    sides = [residual_side(kind, None) for kind in kinds]
    coordinators = [Coordinator(getattr(k, s), s, config) for k, s in zip(kinds, sides, strict=True)]
    peak = max(group["lr"] for group in optimizer.param_groups)
    rate = config.coordinator_rate(peak, peak)
    own = torch.optim.AdamW([c.theta for c in coordinators], lr=rate, weight_decay=0.0)
    for step, loss in enumerate(losses, start=1):
        loss().backward()
        for coordinator in coordinators:
            coordinator.before_step()
        optimizer.step()
        own.step()
        for gate in gates:
            gate.step(examples, batch_size, config.beta, config.gate_lr)
        optimizer.zero_grad()
        for coordinator in coordinators:
            coordinator.after_step(step)
