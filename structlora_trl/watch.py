"""Code that reads the model outside a step sees evaluation weights: every way into the model, watched in one place.

Training weights must stand in the parameters from a training forward to the end of its backward, since the backward reads
them. Autograd does not say when the last backward of a step is over, so they stand until the optimizer step. Readers that
come in between, also after training was left by an exception, get evaluation weights:

    a forward               follows the mode of the module that is called, as dropout does; one under `eval()` is a visit
    `load_state_dict()`     writes over evaluation weights, so that what it writes is seen
    generating, merging     a visit, whatever the mode
    `state_dict()`          evaluation values in the dict
    a copy, a pickle        evaluation values, and no trace of the runtime

A visit puts evaluation weights in place, and training weights back when it ends: a backward that is still to come reads
the values its forward read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import update_wrapper
from types import FrameType

import torch
from torch import nn
from torch._compile import _disable_dynamo  # `torch.compiler.disable`, which would load the compiler on import

from .frames import caller_in, is_running

# Methods that read the LoRA weights past any forward of the module they belong to, or whatever its mode.
_READERS = (
    "generate",
    "generate_batch",
    "merge_and_unload",
    "merge_adapter",
    "unmerge_adapter",
    "add_weighted_adapter",
)


class Watch:
    """The hooks of a runtime on a model.

    Args:
        runtime (`Runtime`, *optional*): whose weights stand; a copied or unpickled watch has none, and does nothing.
        modules (`tuple[nn.Module]`, *optional*): where callers come in, from the outside in: a PEFT model, its tuner and the
            base model.
    """

    def __init__(self, runtime=None, modules: tuple[nn.Module, ...] = ()):
        # Held, so that a model whose training broke off keeps what puts its weights right.
        self._runtime = runtime
        self._modules = modules
        self._readers = [
            _Reader(self, m, name, getattr(m, name)) for m in modules for name in _READERS if callable(_own(m, name))
        ]
        self._reading = 0  # readers on the call stack
        self._called: nn.Module | None = None  # the outermost of ours whose forward runs
        self._call: FrameType | None = None  # that call
        self._depth = 0  # of calls of that module within each other
        self._visit: ExitStack | None = None  # what ends the visit that this forward is
        self._handles = []
        for module in modules:
            # Before hooks that gather sharded parameters: what they gather must be what we put there.
            self._handles.append(module.register_forward_pre_hook(self._before_forward, prepend=True))
            self._handles.append(module.register_forward_hook(self._after_forward, always_call=True))
            self._handles.append(module.register_load_state_dict_pre_hook(self._before_load))
            # Itself: torch sets an attribute on this hook, and methods take none.
            self._handles.append(module.register_state_dict_post_hook(self))
        for reader in self._readers:
            reader.mount()

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        for reader in self._readers:
            reader.unmount()
        self._runtime, self._modules, self._readers = None, (), []

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Evaluation weights for as long as this is open."""
        runtime = self._of(*self._modules)
        visit = None if runtime is None else runtime.begin_visit()
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1
            if visit is not None:
                runtime.end_visit(visit)

    @_disable_dynamo
    def _before_forward(self, module, *_):
        runtime = self._of(module)
        if runtime is None or self._reading:
            return
        if self._is_within(module):
            self._depth += module is self._called
            return
        self._called, self._call, self._depth = module, caller_in(nn.modules.module.__file__), 1
        self._visit = None
        if module.training:
            runtime.train()
        else:
            self._visit = runtime.begin_visit()

    @_disable_dynamo
    def _after_forward(self, module, *_):
        if module is not self._called:
            return
        self._depth -= 1
        if self._depth:
            return
        visit, self._called, self._call, self._visit = self._visit, None, None, None
        if visit is not None and (runtime := self._of(module)) is not None:
            runtime.end_visit(visit)

    def _is_within(self, module) -> bool:
        """Whether one of ours, outside the module or itself, is being called: that call has decided. `from_pretrained` leaves a
        model in `eval()` and PEFT's own modules around it in `train()`: such a forward is one of training, but where no gradient
        can come from it.
        """
        if self._call is None or not is_running(self._call):  # an interrupt leaves what it broke off
            return False
        return self._visit is not None or module.training or torch.is_grad_enabled()

    def _before_load(self, module, state: dict, prefix: str, *_) -> None:
        """Before `module.load_state_dict()`, where it holds some of our parameters."""
        runtime = self._of(module)
        if runtime is None:
            return
        ours = {id(p) for p in runtime.lora_parameters()}
        if any(id(p) in ours and prefix + name in state for name, p in module.named_parameters()):
            runtime.eval()

    def __call__(self, module: nn.Module, state: dict, prefix: str, _metadata: dict) -> None:
        """After `module.state_dict()`: show evaluation values."""
        runtime = self._of(module)
        if runtime is None or runtime.shows_evaluation_weights:
            return
        runtime.refuse_replaced()
        names = {id(p): name for name, p in module.named_parameters()}
        for parameter, value in runtime.evaluation_values():
            if id(parameter) in names:  # an adapter that was deleted has none
                state[prefix + names[id(parameter)]] = value

    def _of(self, *modules: nn.Module):
        """The runtime, where these are its own modules and not parts of a copy."""
        ours = self._runtime is not None and all(any(m is own for own in self._modules) for m in modules)
        return self._runtime if ours else None

    def __deepcopy__(self, memo: dict) -> Watch:
        """Hooks are copied before the parameters are, which find their copies in `memo`."""
        runtime = self._of()
        if runtime is not None and not runtime.shows_evaluation_weights:
            for parameter, value in runtime.evaluation_values():
                if id(parameter) not in memo:
                    memo[id(parameter)] = nn.Parameter(value.clone(), requires_grad=parameter.requires_grad)
        return Watch()

    def __reduce__(self):
        """Hooks are pickled before the parameters are, and storages after all else: what stands must be right by then."""
        runtime = self._of()
        if runtime is not None:
            runtime.eval()
        return Watch, ()


class _Reader:
    """A method of a watched module that runs at evaluation weights; in a copy or a pickle, the method itself."""

    def __init__(self, watch: Watch, module: nn.Module, name: str, method):
        self.watch, self.module, self.name, self.method = watch, module, name, method
        update_wrapper(self, method, updated=())

    def mount(self) -> None:
        self._covered = self.module.__dict__.get(self.name)  # set on the instance by someone before us
        self.module.__dict__[self.name] = self

    def unmount(self) -> None:
        if self.module.__dict__.get(self.name) is self:
            del self.module.__dict__[self.name]
            if self._covered is not None:
                self.module.__dict__[self.name] = self._covered

    def __call__(self, *args, **kwargs):
        with self.watch.reading():
            return self.method(*args, **kwargs)

    def __reduce__(self):
        if self._covered is None:
            return getattr, (self.module, self.name)
        return _itself, (self._covered,)


def _own(module: nn.Module, name: str):
    """A module's own method; `getattr` would also find what PEFT's modules hand through from the model inside."""
    return module.__dict__.get(name) or getattr(type(module), name, None)


def _itself(method):
    return method
