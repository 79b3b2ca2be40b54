"""What the runtime needs from whatever owns the parameters: four verbs, and a place in the optimizer step.

    read_gradients    reduced gradients of the effective factors
    write_gradients   gradients of the latent factors, for the optimizer to step with
    read_latents      master values, which the optimizer steps
    write_working     effective values, which the model computes with

All four speak in stacked factors, one `Factors` per kind, in fp32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import nn

from ..errors import StructLoRAError
from ..mapping import Factors


class Engine(ABC):
    """One way of owning parameters. `name` is what logs and errors call it."""

    name: str

    @abstractmethod
    def install(self, before_step: Callable[[], bool], after_step: Callable[[], None]) -> None:
        """Take the parameters' present values as latents; from now on call `before_step` when gradients are complete and
        `after_step` when the optimizer has stepped.

        Where `before_step` returns False, the optimizer must not change anything in this step.
        """

    @abstractmethod
    def remove(self) -> None:
        """Undo `install`. The working values stay as they are."""

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
    def gradients_are_finite(self) -> bool:
        """Whether no gradient of this step holds NaN or Inf."""

    @abstractmethod
    def gradient_scale(self) -> float:
        """Loss scale still in the gradients, 1.0 where they are unscaled."""

    @abstractmethod
    def learning_rate_scale(self) -> float:
        """Current learning rate over the base one, so that the map's own optimizer follows the schedule."""


def refuse_distributed(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Stop where the parameters are owned by something no engine serves yet.

    Raises:
        StructLoRAError: the launch is DDP, FSDP or DeepSpeed.
    """
    found = None
    if type(optimizer).__module__.startswith("deepspeed") or any(
        "deepspeed" in type(m).__module__ for m in model.modules()
    ):
        found = "a DeepSpeed engine"
    elif any(type(p).__name__ == "DTensor" for p in model.parameters()):
        found = "parameters sharded by FSDP2 (DTensor)"
    elif any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        found = "parameters sharded by FSDP1"
    elif (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        found = f"a distributed run of {torch.distributed.get_world_size()} processes"
    if found:
        raise StructLoRAError(
            found,
            "a single process: DDP, FSDP2 and DeepSpeed have no engine in this version",
            "launch with one process and without DeepSpeed or FSDP, or train plain LoRA",
        )
