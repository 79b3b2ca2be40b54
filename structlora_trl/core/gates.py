"""Information-bottleneck gates (paper, "Information Bottleneck-Driven Low-Rank Direction Filtering").

Gate logits φ have one entry per rank-one direction; sigmoid(φ) is the probability that the direction is
open. In training a gate is a sample of the binary-concrete (Gumbel-Softmax) relaxation; outside training it
is the mean of such samples.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

# Seeds of different runs stay apart for as many steps as this prime.
_STEPS_PER_SEED = 1_000_003


def logit(probability: float) -> float:
    """Inverse of the sigmoid."""
    return math.log(probability) - math.log1p(-probability)


def logistic_noise(count: int, seed: int, step: int) -> Tensor:
    """Standard logistic noise, one draw per gate.

    Drawn on the CPU from (seed, step) alone: the same on every rank and device, and after a resume.

    Returns:
        `Tensor` of shape (count,), fp32, on the CPU.
    """
    generator = torch.Generator("cpu").manual_seed((seed * _STEPS_PER_SEED + step) % 2**63)
    uniform = torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")
    uniform.clamp_(min=torch.finfo(torch.float32).tiny)
    return uniform.log() - torch.log1p(-uniform)


class LogisticNoise:
    """Source of the gates' noise: one draw a step for all gates of the model.

    Args:
        seed (`int`): seed of the run.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def draw(self, step: int, shapes: list[tuple[int, ...]]) -> list[Tensor]:
        """Noise of one step: a CPU tensor for each shape, the same whenever it is asked for."""
        counts = [math.prod(shape) for shape in shapes]
        noise = logistic_noise(sum(counts), self.seed, step).split(counts)
        return [part.view(shape) for part, shape in zip(noise, shapes, strict=True)]


def sample_gates(logits: Tensor, noise: Tensor, temperature: float, hard: bool = False) -> Tensor:
    """Binary-concrete sample sigmoid((φ + noise) / τ), optionally rounded with a straight-through gradient.

    Args:
        logits (`Tensor`): (N, r), or (1, r) where gates are shared over nodes.
        noise (`Tensor`): logistic, (N, r).

    Returns:
        `Tensor` of shape (N, r) in [0, 1].
    """
    soft = torch.sigmoid((logits + noise) / temperature)
    if not hard:
        return soft
    return soft + ((soft > 0.5).to(soft.dtype) - soft).detach()


def expected_gate(logits: Tensor, temperature: float, hard: bool = False) -> Tensor:
    """Mean of `sample_gates` over the noise, so that evaluation weights are the mean of training weights.

    A hard gate is open with probability sigmoid(φ). The mean of a soft one has no closed form, and lies
    between sigmoid(φ) and one half: at τ = 0.3 it is 0.988 times sigmoid(φ) at 0.9, and 1.13 times at 0.05.
    It is integrated over the quantiles of the noise by Gauss-Legendre quadrature, within 1e-4 for τ of 0.3 or
    more, and 1e-3 down to 0.05.

    Args:
        logits (`Tensor`): of any shape.

    Returns:
        `Tensor` of the same shape in [0, 1].
    """
    if hard:
        return torch.sigmoid(logits)
    noise, weights = (table.to(logits) for table in _noise_quadrature())
    return torch.sigmoid((logits[..., None] + noise) / temperature) @ weights


@functools.cache
def _noise_quadrature(points: int = 64) -> tuple[Tensor, Tensor]:
    """Logistic noise at the nodes of Gauss-Legendre quadrature over its quantiles, and weights of sum 1.

    Nodes are the eigenvalues of the Legendre polynomials' Jacobi matrix (Golub and Welsch, 1969). Both fp64,
    CPU.
    """
    order = torch.arange(1, points, dtype=torch.float64, device="cpu")
    beside = order / (4 * order**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return torch.logit((nodes + 1) / 2), vectors[0].square()


def kl_to_prior(logits: Tensor, prior: float) -> Tensor:
    """KL(Bernoulli(sigmoid φ) ‖ Bernoulli(prior)) of each gate, in nats.

    Its mean over data sets bounds the information that the gates hold about the training data (the paper
    writes I(ΔW̃; X); A and B are deterministic and not bounded by it). The label term I(ΔW̃; Y) is the task's
    cross-entropy.
    """
    open_ = torch.sigmoid(logits)
    log_open, log_closed = torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
    return open_ * (log_open - math.log(prior)) + (1 - open_) * (log_closed - math.log1p(-prior))


def kl_gradient(logits: Tensor, prior: float) -> Tensor:
    """Derivative of `kl_to_prior` in closed form: σ(φ)(1 − σ(φ))(φ − logit(prior))."""
    open_ = torch.sigmoid(logits)
    return open_ * (1 - open_) * (logits - logit(prior))
