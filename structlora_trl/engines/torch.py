"""One process and a `torch.optim` optimizer: a bare loop, Accelerate and the HF Trainer alike."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from ..core.kinds import Kind
from ..errors import StructLoRAError
from .base import Engine, copy_values, local, refuse_missing


class TorchEngine(Engine):
    """A `torch.optim` optimizer that steps the model's own parameters: one process or DDP.

    Args:
        optimizer (`torch.optim.Optimizer`): the real optimizer, not a wrapper around it.
        kinds (`list[Kind]`): what it must own.
        name (`str`, *optional*, defaults to "torch"): what logs and errors call it.

    Raises:
        StructLoRAError: the optimizer lacks some trainable LoRA parameter, or moves parameters outside its
            step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, kinds: list[Kind], name: str = "torch"):
        self.name, self.device = name, kinds[0].device
        self._trained = [p for kind in kinds for p in kind.parameters if p.requires_grad]
        self._refuse_unfit(optimizer)
        self._optimizer = weakref.ref(optimizer)
        self._stood: list[tuple[nn.Parameter, Tensor | None]] = []  # gradients, before the step under way

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer()

    def values(self, parameter: nn.Parameter) -> Tensor:
        # Not `.data`: autograd's version counters must see a change. Axolotl's DoRA kernel caches norms by
        # them, and a backward through weights that are gone must fail.
        return parameter.detach()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return None if parameter.grad is None else parameter.grad.detach()

    def holder(self, parameter: nn.Parameter) -> Tensor:
        return parameter

    def has_gradients(self) -> bool:
        return any(p.grad is not None for p in self._trained)

    def put_gradients(self, gradients: list[tuple[nn.Parameter, Tensor]]) -> None:
        fresh = [torch.empty_like(parameter) for parameter, _ in gradients]
        copy_values([local(grad) for grad in fresh], [value for _, value in gradients])
        self._stood = [(parameter, parameter.grad) for parameter, _ in gradients]
        for (parameter, _), grad in zip(gradients, fresh, strict=True):
            parameter.grad = grad

    def skip(self) -> None:
        stepped = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._stood = [(parameter, parameter.grad) for parameter in stepped]
        for parameter in stepped:
            parameter.grad = None

    def end_step(self) -> None:
        for parameter, grad in self._stood:
            parameter.grad = grad
        self._stood = []

    @torch.no_grad()
    def write(self, parameters: list[nn.Parameter], whole: Tensor) -> None:
        copy_values(list(parameters), list(whole))

    def flags(self) -> Tensor:
        flags = super().flags()
        # GradScaler sets `found_inf` and `grad_scale` for the step of optimizers that unscale themselves.
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None:
            flags[0] = torch.maximum(flags[0], found_inf.to(flags.device))
        return flags

    def dropped(self, parameters: list[nn.Parameter]) -> list[bool]:
        return [p.grad is None for p in parameters]

    def let_go(self) -> None:
        self._trained = []

    def gradient_scale(self) -> float | Tensor:
        scale = getattr(self.optimizer, "grad_scale", None)
        return 1.0 if scale is None else scale

    def _refuse_unfit(self, optimizer: torch.optim.Optimizer) -> None:
        name = type(optimizer).__name__
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise StructLoRAError(
                f"an optimizer of type {name}",
                "a torch.optim.Optimizer",
                "pass the optimizer whose `step` updates the model",
            )
        if not getattr(type(optimizer).step, "hooked", False):
            raise StructLoRAError(
                f"an optimizer ({name}) whose `step` runs no hooks, since its class does not call `torch.optim.Optimizer.__init__`",
                "a torch.optim.Optimizer that runs its step hooks",
                "attach to the optimizer that it wraps, or call `super().__init__(params, defaults)` in its class",
            )
        refuse_missing(self._trained, {id(p) for g in optimizer.param_groups for p in g["params"]}, name)
        if any(group.get("gradient_release") for group in optimizer.param_groups):
            raise StructLoRAError(
                f"an optimizer with `gradient_release` ({name}), which steps inside the backward pass",
                "an optimizer that changes parameters in `step` alone",
                "build it without `gradient_release`",
            )
        if any("train_mode" in group for group in optimizer.param_groups):
            raise StructLoRAError(
                f"a schedule-free optimizer ({name}), which moves parameters outside its step",
                "an optimizer that changes parameters in `step` alone",
                "choose another `optim`, such as adamw_torch",
            )
