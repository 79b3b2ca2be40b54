"""What the runtime needs from whatever owns the parameters: four verbs, and a place in the optimizer step.

    read_gradients    reduced gradients of the effective factors
    write_gradients   gradients of the latent factors, for the optimizer to step with
    read_latents      master values, which the optimizer steps
    write_working     effective values, which the model computes with

All speak in stacked factors, one `Factors` per kind, in fp32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..core.mapping import Factors
from .schedule import Rate


class Engine(ABC):
    """One way of owning parameters. `name` is what logs and errors call it."""

    name: str
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def install(self, before_step: Callable[[], bool], after_step: Callable[[bool], None]) -> None:
        """Take the parameters' present values as latents; from now on call `before_step` when gradients are complete and
        `after_step` when the optimizer has stepped.

        Where `before_step` returns False, the optimizer must not change anything in this step. `after_step` is told whether
        it stepped.
        """

    @abstractmethod
    def remove(self) -> None:
        """Undo `install`. The working values stay as they are, and the optimizer continues from them."""

    @abstractmethod
    def read_gradients(self) -> list[Factors] | None:
        """Gradients with respect to the effective factors, or None where no backward has run."""

    @abstractmethod
    def write_gradients(self, gradients: list[Factors], fill_missing: bool) -> None:
        """Replace them by gradients with respect to the latent factors.

        Args:
            fill_missing (`bool`): also where the backward left no gradient, since another depth may pass one on.
        """

    @abstractmethod
    def read_latents(self) -> list[Factors]:
        """The latent factors."""

    @abstractmethod
    def write_latents(self, latents: list[Factors]) -> None:
        """Replace the latent factors, on resume."""

    @abstractmethod
    def write_working(self, effective: list[Factors]) -> None:
        """Put effective values where the model reads them. The latents stay."""

    @abstractmethod
    def stamp(self) -> None:
        """Remember what stands in the model as written by us."""

    @abstractmethod
    def was_written(self) -> bool:
        """Whether someone else has written to the LoRA parameters since `stamp`.

        Raises:
            StructLoRAError: someone has, and the engine cannot take over what was written.
        """

    def was_touched(self) -> bool:
        """The same by what costs nothing to see: False where only the values would tell."""
        return False

    @abstractmethod
    def read_working(self) -> list[Factors]:
        """The values that the model computes with now."""

    def rounded(self, factors: list[Factors]) -> list[Factors]:
        """Values as they read back once they were written to the model."""
        return factors

    def stored(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """A whole value as the model holds this parameter: its shape, its dtype, and its sharding."""
        return value.view_as(parameter).to(parameter.dtype)

    def keep_versions(self) -> ExitStack:
        """Closing it makes autograd take what stands for what stood: for values that return before a backward reads them."""
        return ExitStack()

    def maximizes(self) -> bool:
        """Whether the optimizer ascends."""
        return bool(self.optimizer.param_groups[0].get("maximize", False))

    @abstractmethod
    def gradients_are_finite(self) -> bool:
        """Whether no gradient that the optimizer is about to use, LoRA's or another's, on any rank, holds NaN or Inf.

        Call it after `read_gradients`.
        """

    @abstractmethod
    def gradient_scale(self) -> float:
        """What the engine's step is still to divide the gradients by, 1.0 for nothing: the loss scale of mixed precision, and
        the norm over the limit where the engine clips inside its step."""

    @abstractmethod
    def learning_rate(self) -> Rate:
        """The learning rate of the groups that hold LoRA parameters, for the step that is under way."""
