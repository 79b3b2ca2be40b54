"""What the runtime needs of whatever owns the parameters: four verbs, a place in the step, answers on both.

    read_gradients    reduced gradients of the effective factors
    write_gradients   gradients of the latent factors, for the optimizer to step with
    read_latents      master values, which the optimizer steps
    write_working     effective values, which the model computes with

    install, remove                                           the place in the step
    bad_gradients, gradient_scale, learning_rate, maximizes   of the step under way
    stamp, written, was_touched, keep_versions                whether other code wrote to the model
    read_working, stored, write_latents                       for `reload`, state dicts and a state that is loaded

The verbs speak in stacked factors of nodes, one `Factors` per kind, in fp32. An engine that shards parameters
speaks of this rank's slices of the width (`slices.py`), and where it may of the mapped sides alone, those
that the map changes or reads: the others are empty then. Its verbs are collectives.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..core.kinds import Factors, Kind
from .schedule import Rate
from .slices import Slices


class Engine(ABC):
    """One way of owning parameters. `name` is what logs and errors call it."""

    name: str
    optimizer: torch.optim.Optimizer  # None after `remove`
    kinds: list[Kind]
    slices: list[Slices]  # one per kind
    # Places of the optimizer's groups that hold LoRA parameters: loading its state replaces the groups.
    _groups: list[int]

    @abstractmethod
    def install(
        self,
        before_step: Callable[[], bool],
        after_step: Callable[[bool], None],
        mapped: list[tuple[str, ...]],
    ) -> None:
        """Take the parameters' present values as latents, and from now on call into each optimizer step.

        Args:
            before_step (`Callable`): called when gradients are complete. Where it returns False, the
                optimizer must not change anything in this step.
            after_step (`Callable`): called when the optimizer has stepped, with whether it did.
            mapped (`list[tuple[str, ...]]`): the mapped sides of each kind.
        """

    @abstractmethod
    def remove(self) -> None:
        """Undo `install`. The working values stay as they are, and the optimizer continues from them."""

    @abstractmethod
    def read_gradients(self) -> list[Factors] | None:
        """Gradients with respect to the effective factors, or None where no backward has run."""

    @abstractmethod
    def write_gradients(self, gradients: list[Factors], fill_missing: list[bool]) -> None:
        """Replace them by gradients with respect to the latent factors.

        Args:
            fill_missing (`list[bool]`): of each kind, whether also where the backward left no gradient, since
                another depth may pass one on. A kind without any gradient has none to pass, and rests.
        """

    @abstractmethod
    def read_latents(self, everything: bool = False) -> list[Factors]:
        """The latent factors: of the mapped sides, or of `everything`."""

    @abstractmethod
    def write_latents(self, latents: list[Factors]) -> None:
        """Replace the latent factors of all sides. Those that are not mapped then stand in the model too."""

    @abstractmethod
    def write_working(self, effective: list[Factors], sides: tuple[str, ...]) -> None:
        """Put effective values where the model reads them, of the mapped sides in `sides`. Latents stay."""

    @abstractmethod
    def stamp(self) -> None:
        """Remember what stands in the model as written by us."""

    @abstractmethod
    def written(self) -> Tensor:
        """1.0 where other code has written to this rank's LoRA parameters since `stamp`, be it the same
        values, else 0.0; on the device, without waiting for it.
        """

    def was_touched(self) -> bool:
        """Whether autograd has seen other code write since `stamp`. Free; blind to writes through `.data`."""
        return False

    @abstractmethod
    def read_working(self) -> list[Factors]:
        """The values that the model computes with now, of all sides."""

    @abstractmethod
    def stored(self, factors: list[Factors]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its value in given factors (of all sides), as the model holds it: its shape,
        its dtype, and its sharding. Parameters that the model holds nothing of are left out.
        """

    def keep_versions(self) -> ExitStack:
        """When closed, autograd takes what stands for what stood: for values put back before a backward."""
        return ExitStack()

    def _to_fill(
        self, fill_missing: list[bool], missing: Callable[[nn.Parameter], bool] = lambda p: p.grad is None
    ) -> set[int]:
        """Ids of the parameters that get a gradient where `missing` says that they have none."""
        return {
            id(p)
            for kind, fills in zip(self.kinds, fill_missing, strict=True)
            if fills and not all(map(missing, kind.parameters))
            for p in kind.parameters
            if p.requires_grad
        }

    def maximizes(self) -> bool:
        """Whether the optimizer ascends."""
        return bool(self.optimizer.param_groups[self._groups[0]].get("maximize", False))

    @abstractmethod
    def bad_gradients(self) -> Tensor:
        """1.0 where a gradient of this rank that the optimizer is about to use, LoRA's or another's, holds
        NaN or Inf, else 0.0; on the device, without waiting for it.
        """

    @abstractmethod
    def gradient_scale(self) -> float | Tensor:
        """What the engine's step is still to divide the gradients by, 1.0 for nothing: the loss scale of
        mixed precision, and the norm over the limit where the engine clips inside its step. A tensor, of no
        dimension, where the device has it.
        """

    @abstractmethod
    def learning_rate(self) -> Rate:
        """The learning rate of the groups that hold LoRA parameters, for the step that is under way."""


def holds_nonfinite(tensors: list[Tensor], device: torch.device) -> Tensor:
    """1.0 where some tensor holds NaN or Inf, else 0.0; on `device`, without waiting for it."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if not tensors:
        return torch.zeros((), dtype=torch.float32, device=device)
    # The largest magnitude: in fp16, a 2-norm overflows where every element is finite.
    peaks = torch._foreach_norm(tensors, math.inf)
    return 1 - torch.stack([peak.to(device) for peak in peaks]).isfinite().all().float()


def is_same(expected: Tensor, found: Tensor) -> Tensor:
    """Whether two tensors are equal, NaN being what NaN is: a bool tensor, without waiting for the device."""
    return ((expected == found) | (expected.isnan() & found.isnan())).all()


def copy_values(targets: list[Tensor], values: list[Tensor]) -> None:
    """Copy values into tensors of as many entries, whatever their shapes and dtypes."""
    if targets:
        torch._foreach_copy_(targets, [value.view(t.shape) for t, value in zip(targets, values, strict=True)])
