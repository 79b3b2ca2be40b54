"""Filters of rank-one directions (paper, "Information Bottleneck-Driven Low-Rank Direction Filtering", and what it compares with).

A filter multiplies each direction of an update, column j of B, with a gate. In training a gate may be random; at evaluation
it is the deterministic figure that is saved. The mean gate is 1 at the start, so that attaching changes no output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import StructLoRAConfig
from ..errors import StructLoRAError
from .gates import expected_gate, kl_gradient, logit, sample_gates, top_k_mask
from .width import WHOLE


class Filter(nn.Module):
    """No gates: every direction passes.

    Its state (`state_dict()`) holds what the gates are made of, what they are divided by included: `config.gate_init` is read
    here alone, at the start.

    Args:
        shape (`tuple[int, ...]`): of the gates, (L, r).
        config (`StructLoRAConfig`): the filter's options.
        device (`torch.device`): where the factors live.
    """

    is_stochastic = False  # whether gates in training differ from those at evaluation
    width = WHOLE  # of the factors that it is given
    # `forward` multiplies with `gates`, and these depend on no factor; not inherited (`KindMap.is_columnwise`)
    is_columnwise = True

    def __init__(self, shape: tuple[int, ...], config: StructLoRAConfig, device: torch.device):
        super().__init__()
        self.shape, self.config = shape, config
        self.register_parameter("logits", None)  # gate logits φ, of a filter that learns

    def forward(self, A: Tensor, B: Tensor, noise: Tensor | None) -> Tensor:
        """The filtered update B̃: (L, r, k), (L, d, r), noise (L, r) -> (L, d, r). Without gates, B itself."""
        gates = self.gates(A, B, noise)
        return B if gates is None else B * gates.unsqueeze(-2)

    def gates(self, A: Tensor, B: Tensor, noise: Tensor | None) -> Tensor | None:
        """What each direction is multiplied with, (L, r), or None for 1 everywhere.

        Args:
            A, B (`Tensor`): the latent update, (L, r, k) and (L, d, r).
            noise (`Tensor`, *optional*): (L, r) logistic noise in training, None at evaluation.
        """
        return None

    def openness(self, A: Tensor, B: Tensor) -> Tensor | None:
        """Probability that each direction is open, (L, r), or None where the filter does not choose between directions."""
        return None

    def objective_gradient(self, task: Tensor, kl_scale: float) -> Tensor:
        """The task's gradient of the logits turned into that of L_task + λ(β·KL − γ·I).

        Args:
            task (`Tensor`): of the logits' shape.
            kl_scale (`float`): λβ over the number of gates in the model, so that the KL is a mean over all of them.
        """
        raise NotImplementedError(f"{type(self).__name__} has no logits")


class InformationBottleneck(Filter):
    """Learned gates: m = σ((φ + noise)/τ) in training, E[m] at evaluation, both divided by m₀, which is E[m] at the start."""

    is_stochastic = True
    is_columnwise = True

    def __init__(self, shape: tuple[int, ...], config: StructLoRAConfig, device: torch.device):
        super().__init__(shape, config, device)
        learned = (*shape[:-2], 1, shape[-1]) if config.share_gates else shape
        self.logits = nn.Parameter(torch.full(learned, logit(config.gate_init), device=device))  # (L, r) or (1, r)
        self.register_buffer("initial_gate", self._expected(self.logits.detach()))  # m₀
        if not bool((self.initial_gate > 0).all()):
            raise StructLoRAError(
                f"gates that are 0 in fp32 at the start (gate_init={config.gate_init}, temperature={config.temperature})",
                "a mean gate above 0, which training and evaluation gates are divided by",
                "raise `temperature` or `gate_init`",
            )

    def gates(self, A: Tensor, B: Tensor, noise: Tensor | None) -> Tensor:
        return self.gates_of(self.logits, noise)

    def gates_of(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """The gates of some logits: m / m₀."""
        if noise is None:
            gates = self._expected(logits)
        else:
            gates = sample_gates(logits, noise, self.config.temperature, self.config.hard_gates)
        return (gates / self.initial_gate).expand(self.shape)

    def _expected(self, logits: Tensor) -> Tensor:
        return expected_gate(logits, self.config.temperature, self.config.hard_gates)

    def openness(self, A: Tensor, B: Tensor) -> Tensor:
        return torch.sigmoid(self.logits.detach()).expand(self.shape)

    def objective_gradient(self, task: Tensor, kl_scale: float) -> Tensor:
        gates_per_logit = self.shape[-2] / self.logits.shape[-2]
        kl = gates_per_logit * kl_scale * kl_gradient(self.logits.detach(), self.config.prior)
        return self.config.label_weight * task + kl


class RandomFilter(Filter):
    """Each direction kept with the same probability, drawn in each step, and divided by it; at evaluation all are kept."""

    is_stochastic = True
    is_columnwise = True

    def __init__(self, shape: tuple[int, ...], config: StructLoRAConfig, device: torch.device):
        super().__init__(shape, config, device)
        self.register_buffer("keep_probability", torch.tensor(config.gate_init, device=device))

    def gates(self, A: Tensor, B: Tensor, noise: Tensor | None) -> Tensor | None:
        if noise is None:
            return None
        return (noise + self.keep_probability.logit() > 0) / self.keep_probability


class TopKFilter(Filter):
    """The directions of largest norm pass, the rest do not; at least one does."""

    def __init__(self, shape: tuple[int, ...], config: StructLoRAConfig, device: torch.device):
        super().__init__(shape, config, device)
        self.register_buffer("keep", torch.tensor(max(1, int(config.gate_init * shape[-1] + 1e-6))))

    def forward(self, A: Tensor, B: Tensor, noise: Tensor | None) -> Tensor:
        # Closed directions still learn (straight through), or the first choice would be the last.
        return B + (super().forward(A, B, noise) - B).detach()

    @torch.no_grad()
    def gates(self, A: Tensor, B: Tensor, noise: Tensor | None) -> Tensor:
        return top_k_mask(A, B, int(self.keep), self.width)

    def openness(self, A: Tensor, B: Tensor) -> Tensor:
        return self.gates(A, B, None)


FILTERS = {"ib": InformationBottleneck, "random": RandomFilter, "topk_norm": TopKFilter, "none": Filter}
