"""One process and a `torch.optim` optimizer: a bare loop, Accelerate and the HF Trainer alike.

The model's parameters hold effective values. For the duration of `optimizer.step()` latent values are swapped in, by the
step hooks every torch optimizer has; the parameters' storage is never replaced.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..core.mapping import Factors
from ..core.nodes import Kind
from ..errors import StructLoRAError
from .base import Engine
from .packing import holds_nonfinite
from .schedule import Rate, rate_of


class TorchEngine(Engine):
    """Args:
        optimizer (`torch.optim.Optimizer`): the real optimizer, not a wrapper around it.
        kinds (`list[Kind]`): what it must own.
        name (`str`, *optional*, defaults to "torch"): what logs and errors call it.

    Raises:
        StructLoRAError: the optimizer lacks some trainable LoRA parameter, or moves parameters outside its step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, kinds: list[Kind], name: str = "torch"):
        self.optimizer, self.kinds, self.name = optimizer, kinds, name
        self._handles: list = []
        self._refuse_unfit()
        self._latents: list[Factors] = []  # in the parameters' own dtype
        ours = {id(p) for p in self._trainable()}
        # By place: loading an optimizer's state replaces the groups.
        self._groups = [i for i, g in enumerate(optimizer.param_groups) if any(id(p) in ours for p in g["params"])]

    def install(self, before_step: Callable[[], bool], after_step: Callable[[bool], None]) -> None:
        stepping = []

        def before(optimizer, args, kwargs):
            if any(callable(a) for a in (*args, *kwargs.values())):
                raise StructLoRAError(
                    f"{type(optimizer).__name__}.step called with a closure",
                    "gradients that are complete before the step",
                    "run forward and backward first, then call `step()` without arguments",
                )
            stepping.append(before_step())
            if not stepping[-1]:
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None
            self._put(self._latents)

        def after(optimizer, args, kwargs):
            self._take()
            after_step(stepping.pop())

        self._take()
        self._handles = [
            self.optimizer.register_step_pre_hook(before),
            self.optimizer.register_step_post_hook(after),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def read_gradients(self) -> list[Factors] | None:
        if all(parameter.grad is None for parameter in self._trainable()):
            return None
        return [Factors(_stack_gradients(k.A), _stack_gradients(k.B)) for k in self.kinds]

    def write_gradients(self, gradients: list[Factors], fill_missing: bool) -> None:
        targets, values = [], []
        for kind, stacked in zip(self.kinds, gradients, strict=True):
            for parameters, stack in zip((kind.A, kind.B), stacked, strict=True):
                if not parameters[0].requires_grad:
                    continue
                for parameter, value in zip(parameters, stack, strict=True):
                    if parameter.grad is None:
                        if not fill_missing:
                            continue
                        parameter.grad = torch.zeros_like(parameter)
                    targets.append(parameter.grad)
                    values.append(value.view_as(parameter))
        torch._foreach_copy_(targets, values)

    def read_latents(self) -> list[Factors]:
        return [Factors(A.float(), B.float()) for A, B in self._latents]

    def write_latents(self, latents: list[Factors]) -> None:
        for own, new in zip(self._latents, latents, strict=True):
            own.A.copy_(new.A)
            own.B.copy_(new.B)

    def write_working(self, effective: list[Factors]) -> None:
        self._put(effective)

    def read_working(self) -> list[Factors]:
        return [Factors(_stack(k.A).float(), _stack(k.B).float()) for k in self.kinds]

    def gradients_are_finite(self) -> bool:
        return not self._bad_gradients()

    def gradient_scale(self) -> float:
        scale = getattr(self.optimizer, "grad_scale", None)
        return 1.0 if scale is None else float(scale)

    def learning_rate(self) -> Rate:
        return rate_of(self.optimizer.param_groups[i] for i in self._groups)

    def _bad_gradients(self) -> Tensor:
        """1.0 where a gradient of this rank that the optimizer is about to use holds NaN or Inf, else 0.0."""
        gradients = [p.grad for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        gradients = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        bad = holds_nonfinite(gradients, self.kinds[0].device)
        # GradScaler sets `found_inf` and `grad_scale` for the step of optimizers that unscale themselves.
        found_inf = getattr(self.optimizer, "found_inf", None)
        return bad if found_inf is None else torch.maximum(bad, found_inf.to(bad.device))

    def _trainable(self) -> list[nn.Parameter]:
        return [p for kind in self.kinds for p in (*kind.A, *kind.B) if p.requires_grad]

    @torch.no_grad()
    def _put(self, values: list[Factors]) -> None:
        targets, sources = [], []
        for kind, stacked in zip(self.kinds, values, strict=True):
            for parameters, stack in zip((kind.A, kind.B), stacked, strict=True):
                if parameters[0].requires_grad:
                    # Not `.data`: autograd's version counters must see the change. Axolotl's DoRA kernel caches norms by
                    # them, and a backward through weights that are gone must fail.
                    targets += parameters
                    sources += [value.view_as(p) for p, value in zip(parameters, stack, strict=True)]
        torch._foreach_copy_(targets, sources)

    def _take(self) -> None:
        self._latents = [Factors(_stack(k.A), _stack(k.B)) for k in self.kinds]

    def _refuse_unfit(self) -> None:
        name = type(self.optimizer).__name__
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise StructLoRAError(
                f"an optimizer of type {name}",
                "a torch.optim.Optimizer",
                "pass the optimizer whose `step` updates the model",
            )
        owned = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        missing = sum(id(p) not in owned for p in self._trainable())
        if missing:
            raise StructLoRAError(
                f"{missing} of {len(self._trainable())} trainable LoRA parameters missing from the optimizer ({name})",
                "an optimizer that steps them all",
                "build the optimizer after the adapter, and avoid layer-wise optimizers, which step inside the backward pass",
            )
        if any("train_mode" in group for group in self.optimizer.param_groups):
            raise StructLoRAError(
                f"a schedule-free optimizer ({name}), which moves parameters outside its step",
                "an optimizer that changes parameters in `step` alone",
                "choose another `optim`, such as adamw_torch",
            )


@torch.no_grad()
def _stack(parameters: list[nn.Parameter]) -> Tensor:
    device = parameters[0].device
    return torch.stack([p.detach().to(device).flatten(1) for p in parameters])


def _stack_gradients(parameters: list[nn.Parameter]) -> Tensor:
    device = parameters[0].device
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in parameters]
    return torch.stack([g.to(device, torch.float32).flatten(1) for g in gradients])
