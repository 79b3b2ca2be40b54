"""What the runtime needs of whatever owns the parameters: four verbs, a place in the step, answers on both.

    read_gradients    reduced gradients of the effective factors
    write_gradients   gradients of the latent factors, for the optimizer to step with
    read_latents      master values, which the optimizer steps
    write_working     effective values, which the model computes with

    install, remove, is_stepping, is_replaced                 the place in the step
    gradient_flags, gradient_scale, learning_rate, maximizes  of the step under way
    written, put_back                                         whether other code wrote to the model; what stood before the step
    read_working, write_latents                               for `reload`, and a state that is loaded

The verbs speak in stacked factors of nodes, one `Factors` per kind, in fp32, and of the mapped sides alone,
those that the map changes: the others are empty. Where `everything` is asked for, the others are what stands
in the model. An engine that shards parameters speaks of this rank's slices of the width (`slices.py`). Its
verbs are collectives.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..core.kinds import Factors, Kind
from .schedule import Rate
from .slices import Slices

# Of small factors at once, so that kernels are few; larger ones by themselves, without a copy.
_SUMMED_BYTES = 2**19
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # NaN is what NaN is


class Engine(ABC):
    """One way of owning parameters. `name` is what logs and errors call it."""

    name: str
    optimizer: torch.optim.Optimizer  # None after `remove`
    kinds: list[Kind]
    slices: list[Slices]  # one per kind
    keeps_gradients = True  # in `grad` of the parameters, from one backward to the next
    knows_loss_scale = False
    # Places of the optimizer's groups that hold LoRA parameters: loading its state replaces the groups.
    _groups: list[int]
    # What stood before the step under way, until `write_working`; and the checksums of what that wrote.
    _stood: list[tuple[nn.Parameter, Tensor]]
    _written: Tensor

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
            after_step (`Callable`): called when the optimizer has stepped, with whether it did. Where it
                raises instead, `put_back` is called in its place. Gradients are latents' by then: where the
                engine sees the error itself, it drops them.
            mapped (`list[tuple[str, ...]]`): the mapped sides of each kind.
        """

    @property
    @abstractmethod
    def is_stepping(self) -> bool:
        """Whether the optimizer steps: latents stand in the model then. Where a step has broken off and nobody
        saw it, working values are put back first.
        """

    @property
    def is_replaced(self) -> bool:
        """Whether another engine has taken the parameters over, so that ours steps them no more."""
        return False

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
                another depth may pass one on. Kinds with no gradient at all are skipped.
        """

    @abstractmethod
    def read_latents(self, everything: bool = False) -> list[Factors]:
        """The latent factors: of the mapped sides, or of `everything`."""

    @abstractmethod
    def write_latents(self, latents: list[Factors]) -> None:
        """Replace the latent factors of all sides. Those that are not mapped then stand in the model too."""

    @abstractmethod
    def write_working(self, effective: list[Factors]) -> None:
        """Put effective values of the mapped sides where the model reads them. Latents stay."""

    def written(self) -> Tensor:
        """1.0 where this rank's LoRA parameters, of the mapped sides, hold other values than `write_working`
        put there, else 0.0; on the device, without waiting for it. Told by `checksums`.
        """
        return (self._checksums() != self._written).any().float()

    def _note_written(self) -> None:
        """What stands is what the next step is to find."""
        self._stood, self._written = [], self._checksums()

    @abstractmethod
    def _checksums(self) -> Tensor:
        """`checksums` of what the model holds of the mapped sides."""

    @abstractmethod
    def put_back(self) -> None:
        """Put back what stood before the step under way, where `write_working` has not been called since."""

    @abstractmethod
    def read_working(self) -> list[Factors]:
        """The values that the model computes with now, of all sides."""

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
    def gradient_flags(self) -> Tensor:
        """Two flags of the gradients of this rank that the optimizer is about to use, LoRA's or another's:
        whether one holds NaN or Inf, and whether one is other than zero; (2,), 1.0 or 0.0, on the device,
        without waiting for it.
        """

    def loss_scale(self) -> float:
        """Return what the engine multiplies the loss by."""
        return 1.0

    @abstractmethod
    def gradient_scale(self) -> float | Tensor:
        """What the engine's step is still to divide the gradients by, 1.0 for nothing: the loss scale of
        mixed precision, and the norm over the limit where the engine clips inside its step. A tensor, of no
        dimension, where the device has it.
        """

    @abstractmethod
    def learning_rate(self) -> Rate:
        """The learning rate of the groups that hold LoRA parameters, for the step that is under way."""


def flags_of(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Whether some tensor holds NaN or Inf, and whether some is other than zero: (2,), 1.0 or 0.0, on `device`."""
    gradients = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    gradients = [g for g in gradients if g.numel()]
    if not gradients:
        return torch.zeros(2, dtype=torch.float32, device=device)
    # In fp16, a 2-norm overflows where every element is finite. The largest magnitude does not, and is slower on a CPU.
    order = math.inf if any(gradient.dtype == torch.float16 for gradient in gradients) else 2
    norms = torch.stack([norm.to(device) for norm in torch._foreach_norm(gradients, order)])
    return torch.stack([~norms.isfinite().all(), (norms != 0).any()]).float()


@torch.no_grad()
def checksums(values: list[Tensor], device: torch.device) -> Tensor:
    """A number for each tensor, which tells its bits and their places: (n,) of int64 on `device`. Shapes do not count."""
    sums = [torch.empty(0, dtype=torch.int64, device=device)]
    for (size, *_), alike in itertools.groupby(values, key=lambda v: (v.numel(), v.dtype, v.device)):
        alike = [value.reshape(size) for value in alike]
        at_once = max(1, _SUMMED_BYTES // max(1, alike[0].nbytes))
        bits = _BITS[alike[0].element_size()]
        # Odd, so that a change of one value never adds zero. Integers wrap around.
        weights = torch.arange(1, 2 * size + 1, 2, dtype=torch.int64, device=alike[0].device).to(bits)
        for start in range(0, len(alike), at_once):
            lot = alike[start : start + at_once]
            rows = torch.stack(lot) if len(lot) > 1 else lot[0][None]
            sums.append((rows.view(bits) * weights).sum(-1, dtype=torch.int64).to(device))
    return torch.cat(sums)


@torch.no_grad()
def copies_of(values: list[tuple[nn.Parameter, Tensor]]) -> list[tuple[nn.Parameter, Tensor]]:
    """Parameters with copies of their values, made in few kernels."""
    copies = [torch.empty_like(value) for _, value in values]
    copy_values(copies, [value for _, value in values])
    return [(parameter, copy) for (parameter, _), copy in zip(values, copies, strict=True)]


def copy_values(targets: list[Tensor], values: list[Tensor]) -> None:
    """Copy values into tensors of as many entries, whatever their shapes and dtypes."""
    if targets:
        torch._foreach_copy_(targets, [value.view(t.shape) for t, value in zip(targets, values, strict=True)])
