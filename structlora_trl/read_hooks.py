"""Code that reads the model outside a step sees evaluation weights: hooks on every way into the model.

Training weights must stand in the parameters from a training forward to the end of its backward, since the
backward reads them. Autograd does not say when the last backward of a step is over, so they stand until the
optimizer step. Readers that come in between, also after training was left by an exception, get evaluation
weights:

    a forward               follows the mode of the module that is called, as dropout does, whichever module that contains
                            adapted layers it is
    `load_state_dict()`     writes over evaluation weights
    generating, merging     at evaluation weights, whatever the mode
    `state_dict()`          evaluation values in the dict
    a copy, a pickle        evaluation values, and no trace of the runtime

A reader is a visit: training weights stand again when it ends, since a backward that is still to come reads
the values that its forward read.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from functools import update_wrapper
from types import FrameType

import torch
from torch import nn

# `torch.compiler.disable`, which would load the compiler on import.
from torch._compile import _disable_dynamo

from .call_stack import caller_in, is_running
from .core.kinds import CHECKPOINTED, FACTOR
from .foreign_writes import refuse_replaced

# Methods that read the LoRA weights past any forward of the module they belong to, or whatever its mode.
_READERS = (
    "generate",
    "generate_batch",
    "merge_and_unload",
    "unload",
    "merge_adapter",
    "unmerge_adapter",
    "add_weighted_adapter",
)
# Of these, the ones after which the adapter is gone. Not `delete_adapter`: training that goes on without the adapter
# is to be refused by name.
_ENDING = ("merge_and_unload", "unload")


class ReadHooks:
    """The hooks of a runtime on a model.

    Args:
        runtime (`Runtime`, *optional*): whose weights stand; a copied or unpickled one has none, and does
            nothing.
        model (`nn.Module`, *optional*): hooks go on it and on every module within that contains adapted
            layers.
        readers (`tuple[nn.Module]`, *optional*): modules whose methods of `_READERS` run at evaluation
            weights: a PEFT model, its tuner and the base model.
    """

    def __init__(self, runtime=None, model: nn.Module | None = None, readers: tuple[nn.Module, ...] = ()):
        # Held, so that a model whose training broke off keeps what puts its weights right.
        self._runtime = runtime
        self._reading = 0  # methods of `_READERS` on the call stack
        self._called: nn.Module | None = None  # the outermost hooked module whose forward runs
        self._call: FrameType | None = None  # that call
        self._depth = 0  # of calls of that module within each other
        self._visit: ExitStack | None = None  # what ends the visit that this forward is
        self._handles = []
        around = _modules_around(model, runtime.lora_parameters()) if runtime else []
        self._outer = [model, *(module for module in readers if module is not model)] if runtime else []
        inner = [module for module in around if not any(module is outer for outer in self._outer)]
        self._hooked = {id(module) for module in (*self._outer, *inner)}
        for module in self._outer:
            # Before hooks that gather sharded parameters: what they gather must be what we put there.
            self._handles.append(module.register_forward_pre_hook(self._before_forward, prepend=True))
            self._handles.append(module.register_forward_hook(self._after_forward, always_call=True))
            self._handles.append(module.register_load_state_dict_pre_hook(self._before_load))
            # Itself: torch sets an attribute on this hook, and methods take none.
            self._handles.append(module.register_state_dict_post_hook(self))
        for module in inner:
            self._handles.append(module.register_forward_pre_hook(self._before_inner_forward, prepend=True))
        self._inner_handle = None  # of the hook that ends an inner forward which was called by itself
        self._readers = [
            _Reader(self, m, name, getattr(m, name))
            for m in readers
            for name in _READERS
            if callable(_own(m, name))
        ]
        for reader in self._readers:
            reader.mount()

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        for reader in self._readers:
            reader.unmount()
        self._leave()  # what an interrupt has left would keep the model
        self._runtime, self._outer, self._readers, self._hooked = None, [], [], set()

    @_disable_dynamo
    def _before_forward(self, module, *_):
        self._enter(module)

    def _before_inner_forward(self, module, *_):
        # Within compiled code the modules around have decided; a call out of the graph would break it in each
        # block.
        if not torch.compiler.is_compiling():
            self._enter(module)

    def _enter(self, module: nn.Module) -> None:
        runtime = self._of(module)
        if runtime is None or self._reading:
            return
        if self._is_within(module):
            self._depth += module is self._called
            return
        self._leave()  # what an interrupt has left
        self._called, self._call, self._depth = module, caller_in(nn.modules.module.__file__), 1
        if module not in self._outer:
            self._inner_handle = module.register_forward_hook(self._after_forward, always_call=True)
        if module.training:
            runtime.train()
        else:
            self._visit = ExitStack()
            self._visit.enter_context(runtime.evaluation_weights())

    @_disable_dynamo
    def _after_forward(self, module, *_):
        if module is self._called:
            self._depth -= 1
            if self._depth == 0:
                self._leave()

    def _leave(self) -> None:
        """End the visit that the outermost forward was, if it was one."""
        if self._inner_handle is not None:
            self._inner_handle.remove()
        visit, self._visit = self._visit, None
        self._called = self._call = self._inner_handle = None
        if visit is not None:
            visit.close()

    def _is_within(self, module) -> bool:
        """Whether a hooked module, outside this one or itself, is being called: that call has decided.
        `from_pretrained` leaves a model in `eval()` and PEFT's own modules around it in `train()`: such a
        forward is one of training, but where no gradient can come from it.
        """
        if self._call is None or not is_running(self._call):  # an interrupt leaves what it broke off
            return False
        if self._visit is not None:  # evaluation weights stand for as long as the call around this one runs
            return True
        reads = module in self._outer and not module.training and not torch.is_grad_enabled()
        return not reads

    def _before_load(self, module, state: dict, prefix: str, *_) -> None:
        """Before `module.load_state_dict()`, where it holds some of our parameters."""
        runtime = self._of(module)
        if runtime is None:
            return
        ours = {id(p) for p in runtime.lora_parameters()}
        if any(
            id(p) in ours and _key(prefix + name, state) in state for name, p in module.named_parameters()
        ):
            runtime.eval()

    def __call__(self, module: nn.Module, state: dict, prefix: str, _metadata: dict) -> None:
        """After `module.state_dict()`: show evaluation values."""
        runtime = self._of(module)
        if runtime is None or runtime.shows_evaluation_weights:
            return
        refuse_replaced(runtime.owners)
        names = {id(p): name for name, p in module.named_parameters()}
        for parameter, value in runtime.evaluation_values():
            if id(parameter) in names:  # an adapter that was deleted has none
                state[_key(prefix + names[id(parameter)], state)] = value

    def _of(self, module: nn.Module):
        """The runtime, where the module is one of its own and not part of a copy."""
        return self._runtime if id(module) in self._hooked else None

    def __deepcopy__(self, memo: dict) -> ReadHooks:
        """Hooks are copied before the parameters are, which find their copies in `memo`."""
        runtime = self._runtime
        if runtime is not None and not runtime.shows_evaluation_weights:
            for parameter, value in runtime.evaluation_values():
                if id(parameter) not in memo:
                    memo[id(parameter)] = nn.Parameter(value.clone(), requires_grad=parameter.requires_grad)
        return ReadHooks()

    def __reduce__(self):
        """Pickled before the parameters, whose storages come last: what stands must be right by then."""
        if self._runtime is not None:
            self._runtime.eval()
        return ReadHooks, ()


class _Reader:
    """A method of a module that runs at evaluation weights; in a copy or a pickle, the method itself."""

    def __init__(self, hooks: ReadHooks, module: nn.Module, name: str, method):
        self.hooks, self.module, self.name, self.method = hooks, module, name, method
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
        hooks, runtime = self.hooks, self.hooks._runtime
        with ExitStack() as visit:
            if runtime is not None:
                visit.enter_context(runtime.evaluation_weights())
            hooks._reading += 1
            visit.callback(setattr, hooks, "_reading", hooks._reading - 1)
            result = self.method(*args, **kwargs)
        if self.name in _ENDING and runtime is not None:
            runtime.detach()
        return result

    def __reduce__(self):
        if self._covered is None:
            return getattr, (self.module, self.name)
        return _itself, (self._covered,)


def _modules_around(model: nn.Module, parameters: list[nn.Parameter]) -> list[nn.Module]:
    """The modules that contain adapted layers, from the outside in, without the adapted layers themselves."""
    ours, around = {id(p) for p in parameters}, {}
    for path, module in model.named_modules():
        if any(id(p) in ours for p in module._parameters.values()):
            names = path.split(".")
            layer = next((i for i, name in enumerate(names) if re.fullmatch(FACTOR, name)), 0) - 1
            around |= {".".join(names[:end]): None for end in range(1, layer + 1)}
    return [model.get_submodule(path) for path in around]


def _key(name: str, state: dict) -> str:
    """A parameter's key in a state dict, out of which activation checkpointing's wrapper takes its own name."""
    return name if name in state else name.replace(CHECKPOINTED, "")


def _own(module: nn.Module, name: str):
    """A module's own method; `getattr` on PEFT's modules would also find those of the model inside."""
    return module.__dict__.get(name) or getattr(type(module), name, None)


def _itself(method):
    return method
