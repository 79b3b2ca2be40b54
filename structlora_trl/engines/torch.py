"""One process and a `torch.optim` optimizer: a bare loop, Accelerate and the HF Trainer alike.

The model's parameters hold effective values. For the duration of `optimizer.step()` latent values are swapped
in, by the step hooks every torch optimizer has; the parameters' storage is never replaced.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from types import FrameType, MethodType

import torch
from torch import Tensor, nn

# `torch.compiler.disable`, which would load the compiler on import.
from torch._compile import _disable_dynamo
from torch.distributed.tensor import DTensor

from ..core.expert_storage import empty_nodes, stack_nodes, to_storage
from ..core.kinds import SIDES, Factors, Kind
from ..errors import StructLoRAError
from ..map_context import map_context
from .base import Engine, checksums, copies_of, copy_values, flags_of
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

    def __init__(self, optimizer: torch.optim.Optimizer, kinds: list[Kind], name: str = "torch"):
        self.optimizer, self.kinds, self.name = optimizer, kinds, name
        self.slices = [WHOLE] * len(kinds)
        self._handles: list = []
        # Those that train at attach: `requires_grad` may change for a while, as in PEFT's `disable_adapter`.
        self._trained = [p for kind in kinds for p in kind.parameters if p.requires_grad]
        self._trained_ids = {id(p) for p in self._trained}
        self._refuse_unfit()
        self._step_depth = 0  # calls of `step` within each other
        self._step_frame: FrameType | None = None  # of the outermost
        self._is_stepping = False
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
            if self.is_stepping:
                # The `step` of its class calls that of its parent, which torch has hooked too.
                self._step_depth += 1
                return None
            self._step_depth, self._step_frame = 1, _caller_in(_OPTIMIZER_FILE)
            self._step_thread = threading.get_ident()
            closure = next((a for a in (*args, *kwargs.values()) if callable(a)), None)
            with torch.enable_grad():
                loss = None if closure is None else closure()  # at the effective weights
            # GradScaler's word of an overflow, for optimizers that unscale themselves: this step is none.
            stepped = before_step() and not getattr(optimizer, "found_inf", None)
            if not stepped:
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None
            trained = [(p, value) for p, value in self._mapped_values() if id(p) in self._trained_ids]
            self._stood = copies_of(trained)
            self._is_stepping = True
            self._swap_in_latents()
            if closure is None:
                return None
            given = self._evaluated(loss, closure)
            return tuple(given if a is closure else a for a in args), {
                name: given if a is closure else a for name, a in kwargs.items()
            }

        @_disable_dynamo
        def after(optimizer, args, kwargs):
            if self._step_depth > 1:
                self._step_depth -= 1
                return
            with map_context(self.kinds[0].device):
                self._take()
            after_step(stepped)
            self._step_depth, self._step_frame, self._is_stepping = 0, None, False

        self._sides = mapped
        self._last: list[Factors] | None = None  # all latent factors as they were at `remove`
        self._take()
        self._note_written()
        self._handles = [
            self.optimizer.register_step_pre_hook(before),
            self.optimizer.register_step_post_hook(after),
        ]
        # Hooks that stood before (of averages, or constraints) are to see what the step ends with.
        self.optimizer._optimizer_step_post_hooks.move_to_end(self._handles[1].id, last=False)
        self._guard_step()

    def _guard_step(self) -> None:
        """Have working values stand again where `optimizer.step()` raises. Accelerate, with a GradScaler, calls
        the `step` that it kept from before: then `is_stepping` finds out.
        """
        optimizer = self.optimizer
        self._covered_step, inner = vars(optimizer).get("step"), optimizer.step  # a scheduler's wrapper, say
        function = getattr(inner, "__func__", None)

        @functools.wraps(function or inner)
        def step(*args, **kwargs):
            try:
                return (function or inner)(*args, **kwargs)
            except BaseException:
                if self._is_stepping:  # gradients are pulled back by now: another step would do it again
                    for parameter in self._trained:
                        parameter.grad = None
                self._end_broken_step()
                raise

        # A method where it was one: torch's schedulers wrap methods alone.
        optimizer.step = self._guard = MethodType(step, optimizer) if function else step

    @property
    def is_stepping(self) -> bool:
        if self._is_stepping and not _is_running(self._step_frame, self._step_thread):
            self._end_broken_step()
        return self._is_stepping

    def _end_broken_step(self) -> None:
        self._step_depth, self._step_frame = 0, None
        if self._is_stepping:
            self.put_back()

    def put_back(self) -> None:
        self._is_stepping = False
        self._put_values(self._stood)
        self._stood = []

    def remove(self) -> None:
        self._end_broken_step()
        self._last = self.read_latents(everything=True)
        for handle in self._handles:
            handle.remove()
        if vars(self.optimizer).get("step") is self._guard:
            del self.optimizer.step  # the class's own shows again
            if self._covered_step is not None:
                self.optimizer.step = self._covered_step
        # A frame that an exception left would keep the model, and the optimizer its moments.
        self._handles, self.optimizer, self._guard, self._covered_step = [], None, None, None

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for p in self._trained)

    def _evaluated(self, loss: Tensor | None, closure: Callable) -> Callable[[], Tensor | None]:
        """What a step gets in place of a closure that has been evaluated; it gives the loss, once where latents stand."""
        unread, had_gradients = [loss], self._has_gradients()  # none where the step is skipped

        def result():
            if not unread and not any(self._sides):
                return closure()
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
        return self._of_sides(_stack_gradients, self._sides)

    def write_gradients(self, gradients: list[Factors], fill_missing: list[bool]) -> None:
        filled = self._to_fill(fill_missing)
        targets, values = [], []
        for parameter, value in self._with_values(gradients, self._sides):
            if parameter.grad is None:
                if id(parameter) not in filled:
                    continue
                parameter.grad = torch.zeros_like(parameter)
            targets.append(parameter.grad)
            values.append(value)
        copy_values(targets, values)

    def read_latents(self, everything: bool = False) -> list[Factors]:
        latents = [Factors(A.float(), B.float()) for A, B in self._latents]
        if not everything:
            return latents
        return self._last or [
            Factors(*(getattr(own if side in sides else other, side) for side in SIDES))
            for own, other, sides in zip(latents, self.read_working(), self._sides, strict=True)
        ]

    def write_latents(self, latents: list[Factors]) -> None:
        self._put(latents, [kind.sides for kind in self.kinds])
        self._take()

    def write_working(self, effective: list[Factors]) -> None:
        self._put(effective)
        self._note_written()

    def _checksums(self) -> Tensor:
        return checksums([value for _, value in self._mapped_values()], self.kinds[0].device)

    def _mapped_values(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The parameters of the mapped sides, each with what stands in it."""
        return [
            (parameter, parameter.detach())
            for kind, chosen in zip(self.kinds, self._sides, strict=True)
            for side in chosen
            for parameter in getattr(kind, side)
        ]

    def read_working(self) -> list[Factors]:
        return [Factors(A.float(), B.float()) for A, B in self._standing([kind.sides for kind in self.kinds])]

    def gradient_scale(self) -> float | Tensor:
        scale = getattr(self.optimizer, "grad_scale", None)
        return 1.0 if scale is None else scale

    def learning_rate(self) -> Rate:
        return rate_of(self.optimizer.param_groups[i] for i in self._groups)

    def gradient_flags(self) -> Tensor:
        gradients = [p.grad for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        gradients = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        flags = flags_of(gradients, self.kinds[0].device)
        # GradScaler sets `found_inf` and `grad_scale` for the step of optimizers that unscale themselves.
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None:
            flags[0] = torch.maximum(flags[0], found_inf.to(flags.device))
        return flags

    def _swap_in_latents(self) -> None:
        self._put(self._latents)

    def _put(self, factors: list[Factors], sides: list[tuple[str, ...]] | None = None) -> None:
        self._put_values(self._with_values(factors, self._sides if sides is None else sides))

    @torch.no_grad()
    def _put_values(self, values: list[tuple[nn.Parameter, Tensor]]) -> None:
        # Not `.data`: autograd's version counters must see the change. Axolotl's DoRA kernel caches norms by
        # them, and a backward through weights that are gone must fail.
        copy_values([parameter for parameter, _ in values], [value for _, value in values])

    def _with_values(
        self, values: list[Factors], sides: list[tuple[str, ...]]
    ) -> list[tuple[nn.Parameter, Tensor]]:
        """Each trained parameter on some sides, with its value among those of nodes."""
        return [
            (parameter, value)
            for kind, stacked, chosen in zip(self.kinds, values, sides, strict=True)
            for side in chosen
            for parameter, value in zip(
                getattr(kind, side), to_storage(getattr(stacked, side), side, kind), strict=True
            )
            if id(parameter) in self._trained_ids
        ]

    def _take(self) -> None:
        self._latents = self._standing(self._sides)

    def _standing(self, sides: list[tuple[str, ...]]) -> list[Factors]:
        """What stands in the parameters on some sides, in their own dtype."""
        return self._of_sides(_stack, sides)

    def _of_sides(self, read: Callable[[Kind, str], Tensor], sides: list[tuple[str, ...]]) -> list[Factors]:
        """Stacked factors of each kind on some sides; the others are empty."""
        return [
            Factors(*(read(kind, side) if side in chosen else empty_nodes(side, kind) for side in SIDES))
            for kind, chosen in zip(self.kinds, sides, strict=True)
        ]

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


def _is_running(frame: FrameType | None, thread: int) -> bool:
    """Whether the call of a frame is on the stack of its thread; of another thread, whether that one lives."""
    if thread != threading.get_ident():
        return thread in sys._current_frames()
    current = sys._getframe(1)
    while current is not None and current is not frame:
        current = current.f_back
    return current is not None


def _caller_in(file: str) -> FrameType | None:
    """The innermost call of a function of some source file that is on the stack."""
    current = sys._getframe(1)
    while current is not None and current.f_code.co_filename != file:
        current = current.f_back
    return current
