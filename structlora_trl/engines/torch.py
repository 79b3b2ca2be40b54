"""One process and a `torch.optim` optimizer: a bare loop, Accelerate and the HF Trainer alike.

The model's parameters hold effective values. For the duration of `optimizer.step()` latent values are swapped
in, by the step hooks every torch optimizer has; the parameters' storage is never replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, nn

# `torch.compiler.disable`, which would load the compiler on import.
from torch._compile import _disable_dynamo
from torch.distributed.tensor import DTensor

from ..call_stack import caller_in, is_running
from ..core.expert_storage import stack_nodes, to_storage
from ..core.kinds import SIDES, Factors, Kind
from ..errors import StructLoRAError
from ..map_context import map_context
from .base import Engine, copy_values, holds_nonfinite, is_same
from .schedule import Rate, rate_of
from .slices import WHOLE

_OPTIMIZER_FILE = torch.optim.Optimizer.register_step_pre_hook.__code__.co_filename


class TorchEngine(Engine):
    """A `torch.optim` optimizer that steps plain parameters: one process or DDP.

    Args:
        optimizer (`torch.optim.Optimizer`): the real optimizer, not a wrapper around it.
        kinds (`list[Kind]`): what it must own.
        name (`str`, *optional*, defaults to "torch"): what logs and errors call it.

    Raises:
        StructLoRAError: the optimizer lacks some trainable LoRA parameter, or moves parameters outside its
            step.
    """

    _compares_norms = True  # whether writes are seen by norms too, or by versions alone

    def __init__(self, optimizer: torch.optim.Optimizer, kinds: list[Kind], name: str = "torch"):
        self.optimizer, self.kinds, self.name = optimizer, kinds, name
        self.slices = [WHOLE] * len(kinds)
        self._handles: list = []
        # Those that train at attach: `requires_grad` may change for a while, as in PEFT's `disable_adapter`.
        self._trained = [p for kind in kinds for p in kind.parameters if p.requires_grad]
        self._trained_ids = {id(p) for p in self._trained}
        self._refuse_unfit()
        self._latents: list[Factors] = []  # in the parameters' own dtype
        self._step_depth = 0  # calls of `step` within each other
        self._step_frame = None  # of the outermost; no longer running where an exception left it
        self._stamp: tuple[list[int], Tensor] | None = None
        self._groups = [
            i
            for i, group in enumerate(optimizer.param_groups)
            if any(id(p) in self._trained_ids for p in group["params"])
        ]

    def install(
        self,
        before_step: Callable[[], bool],
        after_step: Callable[[bool], None],
        mapped: list[tuple[str, ...]],
    ) -> None:
        stepped = False

        @_disable_dynamo
        def before(optimizer, args, kwargs):
            nonlocal stepped
            if self._step_depth and is_running(self._step_frame):
                # The `step` of its class calls that of its parent, which torch has hooked too.
                self._step_depth += 1
                return None
            self._step_depth, self._step_frame = 1, caller_in(_OPTIMIZER_FILE)
            closure = next((a for a in (*args, *kwargs.values()) if callable(a)), None)
            with torch.enable_grad():
                loss = None if closure is None else closure()  # at the training weights
            stepped = before_step()
            if not stepped:
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None
            self._swap_in_latents()
            if closure is None:
                return None
            given = self._evaluated(loss)
            return tuple(given if a is closure else a for a in args), {
                name: given if a is closure else a for name, a in kwargs.items()
            }

        @_disable_dynamo
        def after(optimizer, args, kwargs):
            self._step_depth -= 1
            if self._step_depth:
                return
            self._step_frame = None
            with map_context(self.kinds[0].device):
                self._take()
            after_step(stepped)

        self._take()
        self._handles = [
            self.optimizer.register_step_pre_hook(before),
            self.optimizer.register_step_post_hook(after),
        ]
        # Hooks that stood before (of averages, or constraints) are to see what the step ends with.
        self.optimizer._optimizer_step_post_hooks.move_to_end(self._handles[1].id, last=False)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        # A frame that an exception left would keep the model, and the optimizer its moments.
        self._handles, self.optimizer, self._step_frame, self._step_depth = [], None, None, 0

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for p in self._trained)

    def _evaluated(self, loss: Tensor | None) -> Callable[[], Tensor | None]:
        """What a step gets in place of a closure that has been evaluated; it gives the loss, once."""
        unread, had_gradients = [loss], self._has_gradients()  # none where the step is skipped

        def result():
            if not unread or (had_gradients and not self._has_gradients()):
                raise StructLoRAError(
                    f"{type(self.optimizer).__name__}, which evaluates its closure during a step, at intermediate weights",
                    "an optimizer that needs the closure once, before it steps",
                    "choose a first-order optimizer, such as AdamW",
                )
            return unread.pop()

        return result

    def read_gradients(self) -> list[Factors] | None:
        if not self._has_gradients():
            return None
        return [Factors(*(_stack_gradients(kind, side) for side in SIDES)) for kind in self.kinds]

    def write_gradients(self, gradients: list[Factors], fill_missing: list[bool]) -> None:
        filled = self._to_fill(fill_missing)
        targets, values = [], []
        for parameter, value in self._with_values(gradients, SIDES):
            if parameter.grad is None:
                if id(parameter) not in filled:
                    continue
                parameter.grad = torch.zeros_like(parameter)
            targets.append(parameter.grad)
            values.append(value)
        copy_values(targets, values)

    def read_latents(self, everything: bool = False) -> list[Factors]:
        return [Factors(A.float(), B.float()) for A, B in self._latents]

    def write_latents(self, latents: list[Factors]) -> None:
        self._latents = [
            Factors(*(new.to(own.dtype, copy=True) for own, new in zip(*pair, strict=True)))
            for pair in zip(self._latents, latents, strict=True)
        ]

    @torch.no_grad()
    def write_working(self, effective: list[Factors], sides: tuple[str, ...]) -> None:
        # Not `.data`: autograd's version counters must see the change. Axolotl's DoRA kernel caches norms by
        # them, and a backward through weights that are gone must fail.
        pairs = self._with_values(effective, sides)
        copy_values([parameter for parameter, _ in pairs], [value for _, value in pairs])

    def read_working(self) -> list[Factors]:
        return [Factors(A.float(), B.float()) for A, B in self._standing()]

    def stored(self, factors: list[Factors]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for parameter, value in self._with_values(factors, SIDES, trained=False):
            yield parameter, value.detach().reshape(parameter.shape).to(parameter.dtype)

    def gradient_scale(self) -> float | Tensor:
        scale = getattr(self.optimizer, "grad_scale", None)
        return 1.0 if scale is None else scale

    def learning_rate(self) -> Rate:
        return rate_of(self.optimizer.param_groups[i] for i in self._groups)

    def bad_gradients(self) -> Tensor:
        gradients = [p.grad for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        gradients = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        bad = holds_nonfinite(gradients, self.kinds[0].device)
        # GradScaler sets `found_inf` and `grad_scale` for the step of optimizers that unscale themselves.
        found_inf = getattr(self.optimizer, "found_inf", None)
        return bad if found_inf is None else torch.maximum(bad, found_inf.to(bad.device))

    def stamp(self) -> None:
        self._stamp = self._look()

    def written(self) -> Tensor:
        versions, norms = self._look()
        known_versions, known_norms = self._stamp
        if versions == known_versions:
            return 1 - is_same(known_norms, norms).float()
        return torch.ones((), dtype=torch.float32, device=self.kinds[0].device)

    def was_touched(self) -> bool:
        return [p._version for p in self._trained] != self._stamp[0]

    def keep_versions(self) -> ExitStack:
        versions = ExitStack()
        for parameter in self._trained:
            versions.enter_context(torch.autograd._unsafe_preserve_version_counter(parameter))
        return versions

    @torch.no_grad()
    def _look(self) -> tuple[list[int], Tensor]:
        """Autograd's version of each parameter, and its norm: a write through `.data` keeps the version."""
        versions = [p._version for p in self._trained]
        if not self._compares_norms:
            return versions, torch.empty(0, dtype=torch.float32, device="cpu")
        device = self._trained[0].device
        exact = torch.float32 if device.type == "mps" else torch.float64
        norms = torch._foreach_norm(self._trained, 2, exact)
        return versions, torch.stack([norm.to(device) for norm in norms])

    def _swap_in_latents(self) -> None:
        self.write_working(self._latents, SIDES)

    def _with_values(
        self, values: list[Factors], sides: tuple[str, ...], trained: bool = True
    ) -> list[tuple[nn.Parameter, Tensor]]:
        """Each parameter on some sides, of those that are trained, with its value among those of nodes."""
        return [
            (parameter, value)
            for kind, stacked in zip(self.kinds, values, strict=True)
            for side in sides
            if side in kind.sides
            for parameter, value in zip(
                getattr(kind, side), to_storage(getattr(stacked, side), side, kind), strict=True
            )
            if not trained or id(parameter) in self._trained_ids
        ]

    def _take(self) -> None:
        self._latents = self._standing()

    def _standing(self) -> list[Factors]:
        """What stands in the parameters, in their own dtype."""
        return [Factors(*(_stack(kind, side) for side in SIDES)) for kind in self.kinds]

    def _refuse_unfit(self) -> None:
        name = type(self.optimizer).__name__
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise StructLoRAError(
                f"an optimizer of type {name}",
                "a torch.optim.Optimizer",
                "pass the optimizer whose `step` updates the model",
            )
        if not getattr(type(self.optimizer).step, "hooked", False):
            raise StructLoRAError(
                f"an optimizer ({name}) whose `step` runs no hooks, since its class does not call `torch.optim.Optimizer.__init__`",
                "a torch.optim.Optimizer that runs its step hooks",
                "attach to the optimizer that it wraps, or call `super().__init__(params, defaults)` in its class",
            )
        owned = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        missing = sum(id(p) not in owned for p in self._trained)
        if missing:
            raise StructLoRAError(
                f"{missing} of {len(self._trained)} trainable LoRA parameters missing from the optimizer ({name})",
                "an optimizer that steps them all",
                "build one optimizer after the adapter (parameter groups serve several learning rates); layer-wise optimizers, "
                "which step inside the backward pass, are not served",
            )
        if any(group.get("gradient_release") for group in self.optimizer.param_groups):
            raise StructLoRAError(
                f"an optimizer with `gradient_release` ({name}), which steps inside the backward pass",
                "an optimizer that changes parameters in `step` alone",
                "build it without `gradient_release`",
            )
        if any("train_mode" in group for group in self.optimizer.param_groups):
            raise StructLoRAError(
                f"a schedule-free optimizer ({name}), which moves parameters outside its step",
                "an optimizer that changes parameters in `step` alone",
                "choose another `optim`, such as adamw_torch",
            )


@torch.no_grad()
def _stack(kind: Kind, side: str) -> Tensor:
    return stack_nodes([p.detach().to(kind.device) for p in getattr(kind, side)], side, kind)


def _stack_gradients(kind: Kind, side: str) -> Tensor:
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in getattr(kind, side)]
    return stack_nodes([g.to(kind.device, torch.float32) for g in gradients], side, kind)
