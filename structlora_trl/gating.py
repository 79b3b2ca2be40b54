"""The gates of one run: hooks in the model, gradients over the ranks, and the step of the logits."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from transformers import PreTrainedModel

from .core.gates import Bottleneck, Forward, Gate, Hook, nats, openness
from .core.kinds import unwrapped_name
from .errors import StructLoRAError
from .rank_check import world_size

if TYPE_CHECKING:  # tools for finished adapters come here by `peft_adapter`, and need no engine
    from .engines import Engine

logger = logging.getLogger(__name__)
_MANY_DROPS = 20  # more than an fp16 run needs to find its loss scale


@dataclass
class GatedModule:
    """A LoRA module with a gate.

    Args:
        name (`str`): of the LoRA module.
        lora_A (`nn.Module`): whose output are the rank activations.
        factor (`nn.Parameter`): a trained factor of the module, whose gradient tells that it took part.
        gate (`Gate`): the hook.
        dora (`nn.Module`, *optional*): of DoRA, the module that passes the identity through lora_A.
    """

    name: str
    lora_A: nn.Module
    factor: nn.Parameter
    gate: Gate
    dora: nn.Module | None = None


class Gating:
    """The gates of a run, their gradients and their step.

    Args:
        modules (`list[GatedModule]`): those with a gate; none where gates are off.
        bottleneck (`Bottleneck`, *optional*): what the logits descend; None where there are no gates.
        engine (`Engine`): who owns the parameters.
        forward (`Forward`): that the gates share.
        scaler (`GradScaler`, *optional*): of an fp16 loop. The gates' gradients are outside the optimizer, so
            that it does not unscale them.
    """

    def __init__(
        self,
        modules: list[GatedModule],
        bottleneck: Bottleneck | None,
        engine: Engine,
        forward: Forward,
        scaler: GradScaler | None = None,
    ):
        self.modules, self.bottleneck, self.engine = modules, bottleneck, engine
        self.forward, self.scaler = forward, scaler
        self.gates = {unwrapped_name(m.name): m.gate for m in modules}
        self.is_stepping = False  # from before an optimizer's step to after it
        self.drops = 0  # of gradients, since the last step
        self._loss_scale = 1.0  # of the last training forward: DeepSpeed changes its own before it steps
        # Gradients of the step under way, and which of the gates have one.
        self._taken: tuple[Tensor, Tensor] | None = None
        self._has_warned = False
        self._heard: set[str] = set()  # modules with a gradient of training
        self._listening: dict = {}  # handles, of modules whose gate has not fired yet

    def install(self, model: nn.Module, maps: bool) -> Callable[[], None]:
        """Put the gates into a PEFT model. Return what takes them out, which holds neither model nor optimizer.

        Args:
            maps (`bool`): whether the run maps factors.
        """
        modules = self.modules
        handles = [m.lora_A.register_forward_hook(m.gate) for m in modules]
        handles += [m.dora.register_forward_pre_hook(_SkipIdentity(m.gate)) for m in modules if m.dora]
        if modules or maps:
            # A language model is called through its head, or without it.
            roots = {m for m in model.modules() if isinstance(m, PreTrainedModel)} | {model.base_model.model}
            begins = _Begins(self)
            handles += [root.register_forward_pre_hook(begins) for root in roots]
            if modules:
                handles += [root.register_forward_pre_hook(self.forward, with_kwargs=True) for root in roots]
        self._listening = {
            m.name: m.factor.register_post_accumulate_grad_hook(_notes(m, self._heard)) for m in modules
        }
        handles += self._listening.values()
        gates = list(self.gates.values())

        def close() -> None:
            for gate in gates:  # compiled code may have kept one
                gate.acts = False
            for handle in handles:
                handle.remove()

        return close

    def __len__(self) -> int:
        return len(self.gates)  # which stay when modules are let go

    @property
    def logits(self) -> list[Tensor]:
        return [gate.logits for gate in self.gates.values()]

    @torch.no_grad()
    def take_gradients(self, device: torch.device) -> None:
        """Take the gradients of this step, as means over the ranks and without loss scale. A collective.

        Raises:
            StructLoRAError: a module has a gradient and its gate has not fired; or activations are fp16 and no
                scaler is known.
        """
        self._taken, self.drops = None, 0
        if not self.modules:
            return
        self._refuse_unheard()
        self._refuse_unscaled()
        logits = self.logits
        # A module that is frozen for a while rests whole.
        found = [
            x.grad is not None and m.factor.requires_grad for x, m in zip(logits, self.modules, strict=True)
        ]
        if not self._has_warned and not any(found):
            self._has_warned = True
            logger.warning(
                "No gate acted in a step with gradients of the adapter: the model is in `eval()`, or other code removed the hooks "
                "of its `lora_A`. Where this goes on, the run is one without gates; call `model.train()` before the forward."
            )
        gradients = torch.cat(
            [(torch.zeros_like(x) if x.grad is None else x.grad).to(device) for x in logits]
        )
        present = torch.tensor(found, dtype=torch.float32, device=device)
        for x in logits:
            x.grad = None
        ranks = world_size()
        if ranks > 1:
            both = torch.cat([gradients / ranks, present])
            dist.all_reduce(both)
            gradients, present = both.split([len(gradients), len(present)])
        scale = self._loss_scale if self.scaler is None else self.scaler.get_scale()
        # A loss of another sign is ascended.
        scale = -scale if self.engine.maximizes() else scale
        self._taken = gradients / scale, present > 0

    @torch.no_grad()
    def step(self) -> None:
        """Step the logits of the gates that had a gradient; one that is not finite is left out."""
        if self._taken is None or self.bottleneck.lr == 0:
            return
        gradients, present = self._taken
        sizes = [len(x) for x in self.logits]
        before = torch.cat([x.to(gradients.device) for x in self.logits])
        acts = present.repeat_interleave(
            torch.tensor(sizes, dtype=torch.long, device=present.device), output_size=len(before)
        )
        after = torch.where(acts & gradients.isfinite(), self.bottleneck.step(before, gradients), before)
        for x, value in zip(self.logits, after.split(sizes), strict=True):
            x.copy_(value)
        self._taken = None

    def openness(self) -> dict[str, Tensor]:
        """Return the openness of each direction by module, (r,) on the CPU."""
        return {name: openness(gate.logits.detach()).cpu() for name, gate in self.gates.items()}

    def nats(self) -> dict[str, Tensor]:
        """Return what each direction lets through by module, (r,) on the CPU."""
        return {name: nats(gate.logits.detach()).cpu() for name, gate in self.gates.items()}

    @staticmethod
    def metrics(openness: dict[str, Tensor]) -> dict[str, float]:
        """Return mean openness, nats of all directions, and the share that is closed: openness below ½."""
        found = torch.cat(list(openness.values()))
        # ½ log(1 + 1/α) of what selection has closed is 0.
        passed = -torch.log1p(-found.double()).sum() / 2
        return {
            "gate_openness": found.mean().item(),
            "nats": passed.item(),
            "closed_share": (found < 0.5).float().mean().item(),
        }

    def state(self) -> dict[str, Tensor]:
        """Return the logits by module."""
        return {name: gate.logits.detach() for name, gate in self.gates.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take logits from a state. Gates that it lacks, which were off in that run, keep theirs."""
        for name, gate in self.gates.items():
            if name in state:
                gate.logits.copy_(state[name])

    def let_go(self) -> None:
        """Drop modules and engine; openness and state stay."""
        self.modules, self.engine, self._listening = [], None, {}

    def _refuse_unheard(self) -> None:
        """Stop where a module has a gradient and its gate has not fired: fused code went around its forward."""
        if not self._listening:
            return
        for m in self.modules:
            if m.gate.has_fired and m.name in self._listening:
                self._listening.pop(m.name).remove()
        bypassed = [name for name in self._listening if name in self._heard]
        if bypassed:
            more = ", ..." if len(bypassed) > 3 else ""
            raise StructLoRAError(
                f"{len(bypassed)} LoRA modules with gradients whose gates never ran ({', '.join(bypassed[:3])}{more})",
                "a forward under `train()` that calls their `lora_A`, on which the gates are hooks: no fused LoRA kernel, no code "
                "compiled before StructLoRA was attached, no loss on the weights of modules that the forward leaves out",
                "set `gates='off'` to keep such kernels or losses, or switch them off; after an earlier run under "
                "`torch.compile`, call `torch.compiler.reset()`",
            )

    def _refuse_unscaled(self) -> None:
        """Stop where activations are fp16 and nothing tells the scale of the loss."""
        if (
            self.scaler is None
            and not self.engine.knows_loss_scale
            and any(m.gate.is_half for m in self.modules)
        ):
            raise StructLoRAError(
                "fp16 activations and no GradScaler, whose scale the gates' gradients hold",
                "the scaler that the loop steps its optimizer with",
                "call `attach(..., scaler=scaler)`; where the loss is not scaled, `scaler=torch.amp.GradScaler(enabled=False)`; "
                "or set `gates='off'`",
            )


class _SkipIdentity(Hook):
    """Tells a gate that DoRA is about to pass the identity through its lora_A; a forward pre-hook."""

    def __init__(self, gate: Gate):
        self.gate = gate

    def __call__(self, module: nn.Module, _) -> None:
        self.gate.skips_identity = module.training


class _Begins(Hook):
    """A forward pre-hook of the model: ends a step that broke off, notes the loss scale, and drops gradients of logits where
    those of the module's factor were dropped since, by `zero_grad` or by a step that was left out.
    """

    def __init__(self, gating: Gating):
        self.gating = weakref.ref(gating)

    def __call__(self, *_) -> None:
        gating = self.gating()
        if torch.compiler.is_compiling() or gating is None or gating.engine is None:
            return
        gating.is_stepping, gating._loss_scale = False, gating.engine.loss_scale()
        dropped = zip(gating.modules, gating.engine.dropped([m.factor for m in gating.modules]), strict=True)
        gates = [m.gate for m, was_dropped in dropped if was_dropped and m.gate.logits.grad is not None]
        for gate in gates:
            gate.logits.grad = None
        gating.drops += bool(gates)
        if gating.drops == _MANY_DROPS:
            logger.warning(
                "The adapter's gradients were dropped %d times without a step of the optimizer that StructLoRA is attached to. "
                "Where another optimizer trains the model, its gates are noise that nothing learns: call `runtime.detach()`.",
                _MANY_DROPS,
            )


def _notes(module: GatedModule, names: set[str]):
    """A gradient hook that notes a module whose gate a training forward should have met."""
    return lambda parameter: names.add(module.name) if module.lora_A.training else None
