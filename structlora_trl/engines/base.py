"""What the runtime needs of whatever owns the parameters: whose optimizer steps, and who holds which part.

An engine speaks of one parameter at a time, and of this rank's part of its flat values: the whole of it in one
process and under DDP, a shard under FSDP2 and ZeRO. `Layout` joins the parts of several parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..core.expert_storage import to_nodes, to_storage
from ..core.kinds import Kind, matrix_shape
from ..errors import StructLoRAError

Part = tuple[int, int]  # where a part of a flat parameter starts and stops


class Rate(NamedTuple):
    """A learning rate, and the largest that its schedule declares, or itself where none is declared."""

    current: float
    peak: float


class Engine:
    """One way of owning parameters.

    Attributes:
        name (`str`): what logs and errors call it.
        optimizer (`torch.optim.Optimizer`): the one that steps, whose hooks see complete gradients.
        device (`torch.device`): of the adapter.
        group (`ProcessGroup`, *optional*): the ranks that share each parameter; None where each has the whole.
        knows_loss_scale (`bool`): whether `loss_scale` tells what the loss is multiplied by.
    """

    name: str
    optimizer: torch.optim.Optimizer
    device: torch.device
    group: dist.ProcessGroup | None = None
    knows_loss_scale = False

    def part(self, parameter: nn.Parameter) -> Part:
        """Return which part of a parameter this rank holds."""
        return 0, parameter.numel()

    def values(self, parameter: nn.Parameter) -> Tensor:
        """Return what the optimizer steps of this rank's part; writing to it within a step reaches the model."""
        raise NotImplementedError

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the gradient of this rank's part."""
        raise NotImplementedError

    def holder(self, parameter: nn.Parameter) -> Tensor:
        """Return the tensor of the optimizer's groups that holds a parameter."""
        raise NotImplementedError

    def has_gradients(self) -> bool:
        """Return whether a backward has reached the adapter."""
        return True

    def put_gradients(self, gradients: list[tuple[nn.Parameter, Tensor]]) -> None:
        """Have the optimizer step with these gradients of this rank's parts, and with the others as they are."""
        raise NotImplementedError

    def skip(self) -> None:
        """Have the optimizer step with no gradient at all."""
        raise NotImplementedError

    def end_step(self) -> None:
        """Let the gradients stand again that stood before `put_gradients` or `skip`."""

    def write(self, parameters: list[nn.Parameter], whole: Tensor) -> None:
        """Write whole parameters outside of a step, (n, entries of one), equal on every rank. A collective."""
        raise NotImplementedError

    def refuse_unmappable(self, kind: Kind, side: str) -> None:
        """Stop where one side of a kind cannot be mapped.

        Raises:
            StructLoRAError: it says why.
        """

    def flags(self) -> Tensor:
        """Return whether a gradient that the optimizer is about to use holds NaN or Inf, and whether one is other
        than zero, LoRA's or another's: (2,), 1.0 or 0.0, on the device.
        """
        gradients = [p.grad for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        return flags_of(map(local, gradients), self.device)

    def agreed(self, flags: Tensor) -> Tensor:
        """Return which of some flags are 1.0 on any rank."""
        if self.group is not None:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return flags

    def dropped(self, parameters: list[nn.Parameter]) -> list[bool]:
        """Return of which parameters the last gradient was dropped, by `zero_grad` or by a step that was left out."""
        return [False] * len(parameters)

    def let_go(self) -> None:
        """Drop the parameters."""

    def loss_scale(self) -> float:
        """Return what the engine multiplies the loss by."""
        return 1.0

    def gradient_scale(self) -> float | Tensor:
        """Return what the optimizer is still to divide the gradients by."""
        return 1.0

    def rate(self, group: dict) -> Rate:
        """Return the learning rate of one of the optimizer's parameter groups."""
        return rate_of(group)

    def maximizes(self) -> bool:
        """Return whether the optimizer ascends."""
        return bool(self.optimizer.param_groups[0].get("maximize", False))


# A declared peak this large, and this many times the rate, is no rate but the base that a lambda multiplies (Noam's 1.0).
_LARGEST_PEAK, _LONGEST_WARM_UP = 0.5, 5000


def rate_of(group: dict, configured: float = 0.0) -> Rate:
    """Return the learning rate of a parameter group, and its peak as torch's and Transformers' schedulers declare it."""
    if group.get("lr") is None or group.get("relative_step"):
        return Rate(1.0, 1.0)  # Adafactor computes its rate inside the step, relative to the parameters
    current = float(group["lr"])
    declared = max(float(group.get(name) or 0.0) for name in ("initial_lr", "max_lr"))
    declared = max(declared, configured)
    is_base = declared >= max(_LARGEST_PEAK, _LONGEST_WARM_UP * current) and current > 0
    return Rate(current, current if is_base else max(current, declared))


class Layout:
    """One factor of a kind's modules, and which part of each parameter this rank holds.

    Args:
        engine (`Engine`): who owns the parameters.
        kind (`Kind`): the modules.
        side (`str`): 'A' or 'B'.
    """

    def __init__(self, engine: Engine, kind: Kind, side: str):
        self.engine, self.kind, self.side = engine, kind, side
        self.parameters: list[nn.Parameter] = getattr(kind, side)
        self._parts = [engine.part(p) for p in self.parameters]
        self._sizes = [stop - start for start, stop in self._parts]

    def standing(self) -> Tensor:
        """Return this rank's parts of what stands, flat, fp32."""
        return self.join(map(self.engine.values, self.parameters))

    def join(self, parts: Iterable[Tensor]) -> Tensor:
        """Join this rank's parts of all parameters: flat, fp32."""
        flat = [part.reshape(-1) for part in parts]
        if any(
            part.device != self.kind.device for part in flat
        ):  # offloaded, or of a model on several devices
            flat = [part.to(self.kind.device) for part in flat]
        return torch.cat(flat).float()

    def split(self, own: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the parameters of which this rank holds a part, each with its own of joined parts."""
        pairs = zip(self.parameters, own.split(self._sizes), strict=True)
        return [(parameter, part) for parameter, part in pairs if part.numel()]

    def own(self, nodes: Tensor) -> Tensor:
        """Return this rank's parts, joined, of the factors of all nodes."""
        whole = to_storage(nodes, self.side, self.kind).flatten(1)
        if self.engine.group is None:
            return whole.reshape(-1)
        return torch.cat([row[start:stop] for row, (start, stop) in zip(whole, self._parts, strict=True)])

    def whole(self, own: Tensor) -> Tensor:
        """Return the factors of all nodes, (N, r, k) or (N, d, r), of all ranks' joined parts. A collective.

        The sum of parts that do not overlap, since ranks may hold parts of any sizes, and many ranks none.
        """
        shape = matrix_shape(self.parameters[0])
        if self.engine.group is None:
            return to_nodes(own.view(-1, *shape), self.side, self.kind)
        whole = own.new_zeros(len(self.parameters), math.prod(shape))
        places = [row[start:stop] for row, (start, stop) in zip(whole, self._parts, strict=True)]
        copy_values(places, list(own.split(self._sizes)))
        dist.all_reduce(whole, group=self.engine.group)
        return to_nodes(whole.unflatten(1, shape), self.side, self.kind)


def refuse_missing(trained: list[nn.Parameter], stepped: set[int], name: str) -> None:
    """Stop where an optimizer does not step some trainable LoRA parameter.

    Args:
        trained (`list[nn.Parameter]`): the LoRA parameters.
        stepped (`set[int]`): ids of the parameters that it steps.
        name (`str`): of the optimizer.

    Raises:
        StructLoRAError: it says how many.
    """
    missing = sum(id(p) not in stepped for p in trained)
    if missing:
        raise StructLoRAError(
            f"{missing} of {len(trained)} trainable LoRA parameters missing from the optimizer ({name})",
            "an optimizer that steps them all",
            "build one optimizer after the adapter (parameter groups serve several learning rates); layer-wise optimizers, "
            "which step inside the backward pass, are not served",
        )


def flags_of(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return whether some tensor holds NaN or Inf, and whether some is other than zero: (2,), 1.0 or 0.0, on `device`."""
    gradients = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    gradients = [g for g in gradients if g.numel()]
    if not gradients:
        return torch.zeros(2, dtype=torch.float32, device=device)
    # In fp16, a 2-norm overflows where every element is finite. The largest magnitude does not, and is slower on a CPU.
    order = math.inf if any(gradient.dtype == torch.float16 for gradient in gradients) else 2
    norms = torch.stack([norm.to(device) for norm in torch._foreach_norm(gradients, order)])
    return torch.stack([~norms.isfinite().all(), (norms != 0).any()]).float()


@torch.no_grad()  # where autograd is on, DTensor makes a new tensor each time, slowly
def local(x: Tensor) -> Tensor:
    """Return this rank's shard of what FSDP2 shards, other tensors as they are."""
    return x.to_local() if isinstance(x, DTensor) else x


def copy_values(targets: list[Tensor], values: list[Tensor]) -> None:
    """Copy values into tensors of as many entries, whatever their shapes and dtypes."""
    if targets:
        torch._foreach_copy_(targets, [value.view(t.shape) for t, value in zip(targets, values, strict=True)])
