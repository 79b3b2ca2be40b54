"""Gates of rank-one directions (paper, "Information Bottleneck-Driven Low-Rank Direction Filtering").

    y = W x + s·B (m ⊙ A x)        m_j = 1 + √α ε_j,  ε_j standard normal

A gate multiplies the activation of one direction in training, and is absent at evaluation: the contract of
`nn.Dropout`. Its mean is one, so that the optimizer cannot undo it by scaling B: a direction passes the gate
as far as it can be relied on under noise. A gate of variance α lets ½ log(1 + 1/α) nats through.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

# Passes over the data up to which noise costs more than it gives, and from which on it has its whole size.
FEW_PASSES, MANY_PASSES = 5, 45


def noise_share(passes: float) -> float:
    """The share of the whole variance that noise has in a run of so many passes over its data: 0 up to
    `FEW_PASSES`, 1 from `MANY_PASSES` on, and linear between them.

    Noise keeps an adapter from fitting its examples one by one, which many passes over few of them do; in a
    few passes it only slows learning.
    """
    return min(max((passes - FEW_PASSES) / (MANY_PASSES - FEW_PASSES), 0.0), 1.0)


class Gate:
    """The gates of one LoRA module: a forward hook on its lora_A.

    Noise is drawn by torch's own generator, as dropout draws it: activation checkpointing, `torch.compile`, a
    resumed run and data parallelism treat it alike. Each entry of the first axis has its own, and shares it over
    the others: an example, where sequences are not packed into one row. A copy of the model, and a pickle, get
    gates that do nothing.

    Args:
        variance (`float`, *optional*, defaults to 0.0): α; 0 for no noise.
        rank_axis (`int`, *optional*, defaults to -1): axis of the r activations in lora_A's output, from its
            end: -2 for a convolution over one axis, -3 over two.
        identity_width (`int`, *optional*): k of a module with DoRA, which computes the norm of its weights by
            passing the (k, k) identity through lora_A. Inputs of that shape get no noise.

    Attributes:
        has_fired (`bool`): whether a training forward has come through.
    """

    def __init__(self, variance: float = 0.0, rank_axis: int = -1, identity_width: int | None = None):
        self.variance, self.rank_axis, self.identity_width = variance, rank_axis, identity_width
        self.has_fired = False

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], activations: Tensor) -> Tensor | None:
        if not module.training:
            return None
        self.has_fired = True
        if self.variance == 0:
            return None
        width = self.identity_width
        if width is not None and inputs[0].shape == (width, width):
            return None
        return activations * self.sample(activations)

    def sample(self, activations: Tensor) -> Tensor:
        """Gates m of each example: (n, r), with axes of size 1 in the places of the others."""
        shape = [1] * activations.dim()
        for axis in (0, self.rank_axis):
            shape[axis] = activations.shape[axis]
        return activations.new_empty(shape).normal_(1.0, math.sqrt(self.variance))

    def __deepcopy__(self, memo: dict) -> Gate:
        return Gate()

    def __reduce__(self):
        return Gate, ()
