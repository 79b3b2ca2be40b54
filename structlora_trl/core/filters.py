"""Filters of updates (paper, "Information Bottleneck-Driven Low-Rank Direction Filtering") and baselines.

A filter multiplies parts of an update with gates: each direction (a column of B), each expert, or each
attention head. In training a gate may be random; at evaluation it is the deterministic figure that is saved.
The mean gate is 1 at the start, so that attaching changes no output. A map has a list of filters, applied one
after the other.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..config import StructLoRAConfig
from ..errors import StructLoRAError
from .gates import expected_gate, kl_gradient, logit, sample_gates
from .kinds import Factors


class Filter(nn.Module):
    """No gates: every direction passes. Base class of all filters.

    Its state (`state_dict()`) holds what the gates are made of, what they are divided by included:
    `config.gate_init` is read at the start alone.

    Args:
        shape (`tuple[int, int]`): of the gates, (N, r): N modules, r directions.
        config (`StructLoRAConfig`): the filter's options.
        device (`torch.device`): where the factors live.
    """

    is_stochastic = False  # whether gates in training differ from those at evaluation

    def __init__(self, shape: tuple[int, int], config: StructLoRAConfig, device: torch.device):
        super().__init__()
        self.shape, self.config = shape, config
        # Gate logits φ, of a filter that learns; it has an `objective_gradient` then.
        self.register_parameter("logits", None)

    def forward(self, update: Factors, noise: Tensor | None) -> Factors:
        """The filtered update.

        Args:
            update (`Factors`): A (N, r, k), B (N, d, r).
            noise (`Tensor`, *optional*): logistic noise of the gates' shape in training, None at evaluation.
        """
        gates = self.gates(update, noise)
        return update if gates is None else update._replace(B=update.B * gates.unsqueeze(-2))

    def gates(self, update: Factors, noise: Tensor | None) -> Tensor | None:
        """What each direction is multiplied with, (N, r), or None for 1 everywhere."""
        return None

    def openness(self, update: Factors) -> Tensor | None:
        """Probability that each gate is open, or None where the filter does not choose between directions."""
        return None


class InformationBottleneck(Filter):
    """Learned gates: m = σ((φ + noise)/τ) in training, else E[m]; both divided by m₀, E[m] at the start."""

    is_stochastic = True

    def __init__(self, shape: tuple[int, int], config: StructLoRAConfig, device: torch.device):
        super().__init__(shape, config, device)
        learned = (1, shape[1]) if config.share_gates else shape
        start = torch.full(learned, logit(config.gate_init), dtype=torch.float32, device=device)
        self.logits = nn.Parameter(start)  # (N, r) or (1, r)
        self.register_buffer("initial_gate", self._expected(start))  # m₀
        if not bool((self.initial_gate > 0).all()):
            raise StructLoRAError(
                f"gates that are 0 in fp32 at the start (gate_init={config.gate_init}, temperature={config.temperature})",
                "a mean gate above 0, which training and evaluation gates are divided by",
                "raise `temperature` or `gate_init`",
            )

    def gates(self, update: Factors, noise: Tensor | None) -> Tensor:
        return self.gates_of(self.logits, noise)

    def gates_of(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """The gates m / m₀ of some logits, (N, r)."""
        if noise is None:
            gates = self._expected(logits)
        else:
            gates = sample_gates(logits, noise, self.config.temperature, self.config.hard_gates)
        return (gates / self.initial_gate).expand(self.shape)

    def _expected(self, logits: Tensor) -> Tensor:
        return expected_gate(logits, self.config.temperature, self.config.hard_gates)

    def openness(self, update: Factors) -> Tensor:
        return torch.sigmoid(self.logits.detach()).expand(self.shape)

    def objective_gradient(self, task: Tensor, kl_scale: float) -> Tensor:
        """The task's gradient of the logits turned into that of L_task + λ(β·KL − γ·I).

        Args:
            task (`Tensor`): of the logits' shape.
            kl_scale (`float`): λβ over the number of gates in the model, so that the KL is a mean over all of
                them.
        """
        gates_per_logit = self.shape[0] / len(self.logits)
        kl = gates_per_logit * kl_scale * kl_gradient(self.logits.detach(), self.config.prior)
        return self.config.label_weight * task + kl


class ExpertGates(InformationBottleneck):
    """One learned gate for each expert of a mixture: shape (N, 1), over all directions of the expert alike."""

    def __init__(self, count: int, config: StructLoRAConfig, device: torch.device):
        super().__init__((count, 1), replace(config, share_gates=False), device)


class HeadGates(InformationBottleneck):
    """One learned gate for each attention head: on rows of lora_B, or on columns of lora_A.

    Args:
        shape (`tuple[int, int]`): (N, H).
        side (`str`): 'B' where heads are rows of lora_B, 'A' where they are columns of lora_A.
        head_of (`Tensor`): the head of each of these rows or columns, (n,).
    """

    def __init__(
        self,
        shape: tuple[int, int],
        config: StructLoRAConfig,
        device: torch.device,
        side: str,
        head_of: Tensor,
    ):
        super().__init__(shape, config, device)
        self.side = side
        self.register_buffer("head_of", head_of, persistent=False)

    def forward(self, update: Factors, noise: Tensor | None) -> Factors:
        gates = self.gates(update, noise)[:, self.head_of]  # (N, n)
        if self.side == "A":
            return update._replace(A=update.A * gates.unsqueeze(-2))
        return update._replace(B=update.B * gates.unsqueeze(-1))


class RandomFilter(Filter):
    """Each direction kept with one probability, drawn in each step, divided by it; at evaluation all are."""

    is_stochastic = True

    def __init__(self, shape: tuple[int, int], config: StructLoRAConfig, device: torch.device):
        super().__init__(shape, config, device)
        keep = torch.tensor(config.gate_init, dtype=torch.float32, device=device)
        self.register_buffer("keep_probability", keep)

    def gates(self, update: Factors, noise: Tensor | None) -> Tensor | None:
        if noise is None:
            return None
        return (noise + self.keep_probability.logit() > 0) / self.keep_probability


class TopKFilter(Filter):
    """The directions of largest norm pass, the rest do not; at least one does.

    Attributes:
        sum_over_width (`Callable`): where factors are slices of the width, sums a tensor over all slices.
    """

    def __init__(self, shape: tuple[int, int], config: StructLoRAConfig, device: torch.device):
        super().__init__(shape, config, device)
        self.sum_over_width = lambda x: x
        keep = max(1, int(config.gate_init * shape[-1] + 1e-6))
        self.register_buffer("keep", torch.tensor(keep, dtype=torch.int64, device="cpu"))

    def forward(self, update: Factors, noise: Tensor | None) -> Factors:
        # Closed directions still learn (straight through), or the first choice would be the last.
        filtered = super().forward(update, noise)
        return update._replace(B=update.B + (filtered.B - update.B).detach())

    @torch.no_grad()
    def gates(self, update: Factors, noise: Tensor | None) -> Tensor:
        squares = torch.stack([update.A.square().sum(-1), update.B.square().sum(-2)])  # (2, N, r)
        A, B = self.sum_over_width(squares).sqrt()
        norms = torch.where(A.any(), A * B, B)  # VeRA has no lora_A
        return torch.zeros_like(norms).scatter_(-1, norms.topk(int(self.keep), dim=-1).indices, 1.0)

    def openness(self, update: Factors) -> Tensor:
        return self.gates(update, None)


FILTERS = {"ib": InformationBottleneck, "random": RandomFilter, "topk_norm": TopKFilter, "none": Filter}
