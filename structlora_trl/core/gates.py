"""Gates of rank-one directions, learned under the information bottleneck (paper, "Information Bottleneck-Driven
Low-Rank Direction Filtering").

    y = W x + s·B (m ⊙ A x)        m: one gate for each direction and example, with mean one
    p = σ(θ) = 1 / (1 + α)         openness of a direction; θ is its logit, α the variance of its gate
    gaussian   m = 1 + √α ε        ε standard normal
    gumbel     m = z / E[z]        z = σ((θ + logistic noise) / τ), the paper's relaxed Bernoulli

A gate multiplies the activation of one direction in training, and is absent at evaluation: the contract of
`nn.Dropout`. Its mean is one, since the optimizer undoes any other by scaling B: what a gate can learn is how
much noise its direction stands. A direction passes at most nats = ½ log(1 + 1/α) about the input.

The logits descend the bound on the evidence of N examples,

    N · (mean task loss) + β Σ_j nats_j

the paper's L_task + λ(L_task + β I(ΔW; X) − γ I(ΔW; Y)) with one price in place of three weights: I(ΔW; Y) is
bounded by the task loss itself, which makes the sum (1 + λ + λγ) L_task + λβ I(ΔW; X).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

LOGITS = (-4.0, 8.0)  # openness 0.018 to 0.9997: beyond, a gate learns too slowly to come back
LARGEST_STEP = 1.0  # by which a gate opens, so that one odd batch does not undo what it has learned


def absent(*_) -> None:
    """The hook that a copy of a gated model, or a pickle, has in place of one of these."""


def _absent():
    return absent


class Hook:
    """A hook that stays with its model: a copy of the model and a pickle have `absent` in its place."""

    def __deepcopy__(self, memo: dict):
        return absent

    def __reduce__(self):
        return _absent, ()


class Forward(Hook):
    """What the gates of a model know of the forward under way; a pre-hook of the model, with keyword arguments.

    Attributes:
        has_gradients (`bool`): whether gradients were on when it began. Reentrant checkpointing runs blocks
            without gradients and repeats them with, and both need the noise. Generation and evaluation under
            `torch.no_grad()` need none, even while the model is in `train()`.
        starts (`Tensor`, *optional*): (n, s), where in its row the sequence of each position starts, by
            `position_ids` that start again: rows of packed or padding-free batches hold several. None where the
            model was called without `position_ids`.
    """

    has_gradients: bool = False
    starts: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.has_gradients, self.starts = torch.is_grad_enabled(), None
        positions = kwargs.get("position_ids")
        if isinstance(positions, Tensor) and positions.dim() == 2:
            places = torch.arange(positions.shape[1], dtype=torch.long, device=positions.device).expand_as(
                positions
            )
            self.starts = torch.where(positions == 0, places, 0).cummax(1).values


class Gate(Hook):
    """The Gaussian gates of one LoRA module, m = 1 + √α ε: a forward hook on its lora_A.

    Noise is drawn by torch's own generator, as dropout draws it: activation checkpointing, `torch.compile`, a
    resumed run and data parallelism treat it alike. Each example has its own draw, which its tokens or pixels
    share: an entry of the first axis, or a sequence of a packed row. A copy of the model, and a pickle, get no
    gates.

    Args:
        rank (`int`): r, the number of directions.
        openness (`float`): p of each direction at the start.
        device (`torch.device`, *optional*): of the module.
        rank_axis (`int`, *optional*, defaults to -1): axis of the r activations in lora_A's output, from its
            end: -2 for a convolution over one axis, -3 over two.
        forward (`Forward`, *optional*): of the model; where omitted, gates act only where gradients are on.

    Attributes:
        logits (`Tensor`): θ, (r,), fp32, a leaf that autograd fills.
        has_fired (`bool`): whether a training forward has come through.
        is_half (`bool`): whether its activations were fp16, whose gradients are scaled.
        skips_identity (`bool`): whether the next input is the identity by which DoRA computes the norm of its
            weights.
    """

    def __init__(
        self,
        rank: int,
        openness: float,
        device: torch.device | None = None,
        rank_axis: int = -1,
        forward: Forward | None = None,
    ):
        start = torch.full((rank,), math.log(openness / (1 - openness)), dtype=torch.float32, device=device)
        self.logits = start.requires_grad_()
        self.rank_axis, self.forward = rank_axis, forward or Forward()
        self.acts, self.has_fired, self.is_half, self.skips_identity = True, False, False, False

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], activations: Tensor) -> Tensor | None:
        if not (self.acts and module.training and (torch.is_grad_enabled() or self.forward.has_gradients)):
            return None
        if self.skips_identity:
            self.skips_identity = False
            return None
        self.has_fired, self.is_half = True, activations.dtype == torch.float16
        return activations * self.sample(activations)

    def sample(self, activations: Tensor) -> Tensor:
        """Return the gates m, which broadcast over the activations."""
        deviation = torch.exp(self.logits / -2).to(activations.dtype)  # √α
        return 1 + self._beside(deviation) * self._drawn(activations, torch.randn)

    def _beside(self, of_directions: Tensor) -> Tensor:
        """Return a number for each direction, (r,), in a shape that broadcasts over the activations."""
        return of_directions.view(-1, *[1] * (-1 - self.rank_axis))

    def _drawn(self, activations: Tensor, draw: Callable[..., Tensor]) -> Tensor:
        """Return a draw of each example and direction: (n, 1, ..., r), or (n, s, r) where rows hold several sequences."""
        starts = self.forward.starts
        if starts is not None and self.rank_axis == -1 and activations.shape[:-1] == starts.shape:
            drawn = draw(activations.shape, dtype=activations.dtype, device=activations.device)
            return drawn.gather(1, starts.to(drawn.device)[..., None].expand_as(drawn))
        shape = [1] * activations.dim()
        for axis in (0, self.rank_axis):
            shape[axis] = activations.shape[axis]
        return draw(shape, dtype=activations.dtype, device=activations.device)


class GumbelGate(Gate):
    """m = z / E[z], z a relaxed Bernoulli (Gumbel-Softmax of two classes), whose limit τ -> 0 has variance α too."""

    temperature = 0.5
    quantiles = 64  # of the logistic noise, over which E[z] is a mean

    def sample(self, activations: Tensor) -> Tensor:
        at = (
            torch.arange(self.quantiles, dtype=torch.float32, device=activations.device) + 0.5
        ) / self.quantiles
        mean = self._relaxed(at.logit()[:, None], self.logits).mean(0)
        uniform = self._drawn(activations, torch.rand).float()
        z = self._relaxed(uniform.logit(eps=1e-6), self._beside(self.logits))
        return (z / self._beside(mean)).to(activations.dtype)

    def _relaxed(self, noise: Tensor, logits: Tensor) -> Tensor:
        return torch.sigmoid((noise + logits) / self.temperature)


GATES = {"gaussian": Gate, "gumbel": GumbelGate}


def openness(logits: Tensor) -> Tensor:
    """Return p = σ(θ), from 0 (closed) to 1 (open)."""
    return torch.sigmoid(logits)


def nats(logits: Tensor) -> Tensor:
    """Return ½ log(1 + 1/α), the most that each direction passes about the input, in nats."""
    return softplus(logits) / 2


@dataclass(frozen=True)
class Bottleneck:
    """The objective of the logits, N · (mean loss) + β Σ nats, and the step that descends it.

    The step is plain gradient descent with a rate per epoch: without labels, β·η/2 of a logit in each, whatever
    the batch. Adam's steps are as long whatever the price, so that it closes gates which many examples hold open.

    Args:
        examples (`float`): N, the number of terms that the loss is a mean of, over the data of the run.
        batch_size (`float`): how many of these an optimizer step sees, over all processes.
        beta (`float`): β, the price of a nat; 1 is the bound on the evidence.
        lr (`float`): η, the rate of an epoch.
    """

    examples: float
    batch_size: float
    beta: float
    lr: float

    @torch.no_grad()
    def step(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """Return logits after one step.

        Args:
            logits (`Tensor`): θ, any shape.
            gradient (`Tensor`): of the mean task loss with respect to θ.
        """
        whole = self.examples * gradient + self.beta * torch.sigmoid(logits) / 2
        # Noise costs loss, so that a gradient which closes a gate faster than the price of an open one is chance. In small
        # batches, whose gradients have long tails, closing by it drowns the run in noise.
        step = self.lr * self.batch_size / self.examples * whole.clamp(max=self.beta / 2)
        return (logits - step.clamp(min=-LARGEST_STEP)).clamp(*LOGITS)
