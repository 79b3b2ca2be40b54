"""One optimizer step: gradients are pulled back before it, and what it made is mapped after it.

The model's parameters are the adapter that will be saved, at any line of a step. A training forward changes none
of them: gates are hooks on its activations (`core/gates.py`).
"""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

# `torch.compiler.disable`, which would load the compiler on import.
from torch._compile import _disable_dynamo

from .config import StructLoRAConfig
from .core.diagnostics import cosines, neighbour_products, structure_metrics
from .core.expert_storage import empty_nodes, to_storage
from .core.graph import DepthGraph
from .core.kinds import SIDES, Factors, Kind, short_names, unwrapped_name
from .core.mapping import DEFAULT_PARTS, KindMap, Parts, mapped_sides
from .engines import Engine
from .engines.base import Layout
from .errors import StructLoRAError
from .gates_file import GATES_NAME, write_openness
from .gating import Gating
from .map_context import in_map_context
from .mapped_side import MappedSide
from .rank_check import is_first_rank, world_size
from .state import State

logger = logging.getLogger(__name__)
_LISTED = 8  # names in a line

_attached: weakref.WeakSet[Runtime] = weakref.WeakSet()


class Runtime:
    """StructLoRA on one adapter and one optimizer. `attach` builds it.

    Args:
        model (`nn.Module`): the PEFT model whose parameters the kinds hold.
        kinds (`list[Kind]`): what is trained.
        config (`StructLoRAConfig`): how.
        engine (`Engine`): who owns the parameters.
        gating (`Gating`): the gates.
        quiet (`dict[str, int]`, *optional*): why other modules have no gates -> number of modules.
        align (`bool`, *optional*, defaults to False): give every node of a fresh kind (B = 0) the lora_A of the first.
        moves_base (`bool`, *optional*, defaults to False): the adapter's start holds part of the base weights (PiSSA).
        parts (`Parts`, *optional*): what the method is built of.
        frozen (`list[nn.Parameter]`, *optional*): LoRA factors of the adapter that no map has, and must stay frozen.
        select_step (`int`, *optional*): optimizer steps, taken or skipped, after which directions are selected.

    Attributes:
        step (`int`): optimizer steps that counted.
        skipped_steps (`int`): optimizer steps skipped for NaN or Inf in the gradients. In a loop of your own,
            those that a GradScaler or DeepSpeed leaves out are not among them: no hook is called then.
        calls (`int`): optimizer steps that were begun.
        gating (`Gating`): the gates.
        is_attached (`bool`): whether the model and its optimizer are still in use.
        maps (`list[KindMap]`): one per kind.
        sides (`list[MappedSide]`): the factors that the maps change.
        optimizer (`torch.optim.AdamW`, *optional*): of the maps' own parameters; None where they have none.
        has_aligned (`bool`): whether attaching changed lora_A, of a fresh adapter.

    Example:
        >>> runtime = attach(model, optimizer, examples=labels, batch_size=labels / len(batches))
        >>> "structlora/effective_rank" in runtime.metrics()
        True
        >>> runtime.detach()  # the model keeps its weights: a plain LoRA adapter
    """

    def __init__(
        self,
        model: nn.Module,
        kinds: list[Kind],
        config: StructLoRAConfig,
        engine: Engine,
        gating: Gating,
        *,
        quiet: dict[str, int] | None = None,
        align: bool = False,
        moves_base: bool = False,
        parts: Parts = DEFAULT_PARTS,
        frozen: list[nn.Parameter] | None = None,
        select_step: int | None = None,
    ):
        self.model, self.kinds, self.config, self.engine, self.gating = model, kinds, config, engine, gating
        self.device, self.parts, self.quiet, self.select_step = (
            kinds[0].device,
            parts,
            quiet or {},
            select_step,
        )
        self._frozen = frozen or []
        self.is_attached = True
        self.step = self.skipped_steps = self.calls = 0
        self._places = _places_of(self.model, self.lora_parameters())
        self._active = set(self.model.active_adapters)
        self._cosines: list[Tensor] = []  # of gradients, in the first step since the last `metrics()`
        # Of the step under way: what the optimizer is yet to step; the sides that it steps now, and those that move;
        # whether the step counts, and has been counted; and which parameters rest.
        self._left: set[int] = set()
        self._now: list[MappedSide] | None = None
        self._moving: list[MappedSide] = []
        self._counts = self._is_counted = self._wants_cosine = False
        self._rests: set[int] = set()
        self._missing = 0  # parameters without gradients in the last step
        # State and metrics, once detached.
        self._last: tuple[dict[str, Tensor], dict[str, float]] | None = None
        self._build(align, moves_base)
        # A model outlives a run that nobody ended: its gates go with the runtime.
        self._close_gates = weakref.finalize(self, self.gating.install(self.model, bool(self.sides)))
        self._close_gates.atexit = False
        optimizer = self.engine.optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before_hook),
            optimizer.register_step_post_hook(self._after_hook),
        ]
        # Hooks that stood before (of averages, or constraints) are to see what the step ends with.
        optimizer._optimizer_step_post_hooks.move_to_end(self._handles[1].id, last=False)
        _attached.add(self)

    def lora_parameters(self) -> list[nn.Parameter]:
        """The LoRA parameters that are trained; the maps' own are `parameters()` of each in `maps`."""
        return [p for kind in self.kinds for p in kind.parameters]

    @in_map_context
    @torch.no_grad()
    def _build(self, align: bool, moves_base: bool) -> None:
        """Build maps, sides and the optimizer of Θ from the factors that stand, and align those factors where asked."""
        self._layouts = [
            {side: Layout(self.engine, kind, side) for side in kind.sides} for kind in self.kinds
        ]
        aligned = self._to_align() if align else [False] * len(self.kinds)
        self.has_aligned, self.maps = any(aligned), []
        for kind, start, same in zip(self.kinds, self._factors(), aligned, strict=True):
            if same:  # the first lora_A at all depths, and of all experts
                start = start._replace(A=start.A[:1])
                nodes = start.A.expand(kind.node_count, -1, -1)
                self.engine.write(kind.A, to_storage(nodes, "A", kind).flatten(1))
            origin_B = start.B.clone() if moves_base or kind.is_vera else None
            self.maps.append(KindMap(kind, self.config, start.A.clone(), origin_B, self.parts))
        self.sides = [
            MappedSide(m, layouts[side])
            for m, layouts in zip(self.maps, self._layouts, strict=True)
            for side in mapped_sides(m.kind, self.config)
        ]
        self._holders = {id(self.engine.holder(p)) for p in self.lora_parameters() if p.requires_grad}
        groups = [{"params": list(s.coordinator.parameters())} for s in self.sides if s.coordinator]
        # Of Θ, equal on every rank. Each step sets its rates.
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0) if groups else None

    def _to_align(self) -> list[bool]:
        """Return of which kinds lora_A may be aligned, of a fresh adapter: lora_A is trained, and lora_B is zero.

        An adapter is fresh where no kind adds anything. Where one does, a kind without any direction has lost
        them to selection, and what stands in its lora_A was trained.
        """
        empty = [[not bool(factor.any()) for factor in factors] for factors in self._factors()]
        if not all(map(any, empty)):
            return [False] * len(self.kinds)
        return [
            is_empty and not kind.is_vera and kind.A[0].requires_grad
            for kind, (_, is_empty) in zip(self.kinds, empty, strict=True)
        ]

    def _factors(self) -> Iterator[Factors]:
        """Yield the factors of the nodes that stand, whole and fp32, kind by kind. A collective where ranks hold parts."""
        for kind, layouts in zip(self.kinds, self._layouts, strict=True):
            factors = {side: empty_nodes(side, kind) for side in SIDES}
            for side, layout in layouts.items():
                factors[side] = layout.whole(layout.standing())
            yield Factors(**factors)

    @staticmethod
    def attached_to(parameters: set[int]) -> list[Runtime]:
        """Return the runtimes that train some of the parameters with these ids."""
        return [
            r
            for r in list(_attached)
            if r.is_attached and not parameters.isdisjoint(map(id, r.lora_parameters()))
        ]

    def __repr__(self) -> str:
        """What acts, in one line: engine (with its stage), processes, kinds and depths, gates, edges."""
        return ", ".join(self.describe())

    @property
    def is_off(self) -> bool:
        """Whether nothing acts, whatever switched the gates off: this is plain LoRA."""
        return not self.gating and self.config.coordinator == "none" and self.config.keep is None

    def describe(self) -> list[str]:
        """What acts: engine and kinds; gates; coordinator; the selection where there is one."""
        short = short_names([kind.name for kind in self.kinds])
        depths = _listed([f"{short[kind.name]} x{kind.depth_count}" for kind in self.kinds])
        config, processes = self.config, f"{world_size()} process{'es' if world_size() > 1 else ''}"
        edges = sum(int(m.graph.edges.sum()) // 2 for m in self.maps if m.coordinators)
        graph = "" if config.coordinator == "none" else f" ({edges} edges, {config.edges})"
        alone = [short[m.kind.name] for m in self.maps if not m.sides and m.kind.depth_count > 1]
        unknown = (
            f", not coordinated (role unknown, see `roles`): {_listed(alone)}" if graph and alone else ""
        )
        step = self.select_step
        return [
            f"StructLoRA on {self.engine.name}, {processes}: {len(self.kinds)} kinds ({depths})",
            self._describe_gates(),
            f"coordinator {config.coordinator}{graph}{unknown}",
            *([] if step is None else [f"keep={config.keep} from step {step} on"]),
        ]

    def _describe_gates(self) -> str:
        on, of = [], self.gating.bottleneck
        if of is not None:
            on = [
                f"{self.config.gates} gates on {len(self.gating)} modules, {of.examples:,.0f} labels, "
                f"{of.batch_size:,.0f} a step, beta {of.beta:g}"
            ]
        off = [f"no gates on {count} modules ({why})" for why, count in self.quiet.items()]
        return "; ".join(on + off)

    @_disable_dynamo
    def _before_hook(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict):
        closure = next((a for a in (*args, *kwargs.values()) if callable(a)), None)
        if closure is None:
            self._before_step()
            return None

        evaluations = 0

        @functools.wraps(closure)
        def evaluated():
            nonlocal evaluations
            evaluations += 1
            if evaluations > 1 and self.sides:
                raise StructLoRAError(
                    f"{type(optimizer).__name__}, which evaluates its closure several times in a step",
                    "an optimizer that needs the closure once, since gradients are carried back through the map once a step",
                    "choose a first-order optimizer, such as AdamW",
                )
            loss = closure()
            if evaluations == 1:
                self._before_step()
            return loss

        given = [evaluated if a is closure else a for a in args]
        return tuple(given), {name: evaluated if a is closure else a for name, a in kwargs.items()}

    @_disable_dynamo
    def _after_hook(self, *_) -> None:
        if self._now is not None:  # else the parent's `step` was called within that of a class
            self._after_step()

    @in_map_context
    @torch.no_grad()
    def _before_step(self) -> None:
        """Carry the gradients back through the map."""
        if self.gating.is_stepping:  # the `step` of a class calls its parent's
            return
        self.gating.is_stepping = True
        groups = {id(p): group for group in self.engine.optimizer.param_groups for p in group["params"]}
        now = groups.keys() & self._holders
        if not now <= self._left:  # a step begins; DeepSpeed's calls the hooks once for each group
            self.calls += 1
            self._left, self._is_counted = set(self._holders), False
            self._begin()
        self._left -= now
        self._now = [s for s in self.sides if id(self.engine.holder(s.parameters[0])) in now]
        self._moving, self._counts = [], bool(now) and self._has_good_gradients()
        if not self._counts:
            return
        self._moving = [side for side in self._now if side.is_moving()]
        optimizer = self.engine.optimizer
        still = {id(group) for group in optimizer.param_groups if self.engine.rate(group).current == 0}
        self._rests = {
            id(p)
            for side in self._now
            for p in side.parameters
            if not p.requires_grad or id(groups[id(self.engine.holder(p))]) in still
        }
        self._pull_back(groups)

    def _has_good_gradients(self) -> bool:
        """Return whether the step counts. Gradients with NaN or Inf are taken from the optimizer."""
        if not self.engine.has_gradients():
            return False
        if not self.sides and getattr(self.engine.optimizer, "found_inf", None) is None:
            return True  # as plain LoRA, whatever they hold
        # The one place where a step waits for the device.
        is_bad, is_moving = self.engine.agreed(self.engine.flags()).bool().tolist()
        if is_bad:
            self.skipped_steps += 1
            self.engine.skip()
            logger.warning(
                "Gradients hold NaN or Inf: step skipped, nothing changed (%d skipped so far).",
                self.skipped_steps,
            )
        elif not is_moving:
            # As after `zero_grad(set_to_none=False)`; torch's checkpoints have an optimizer step so, too.
            self._refuse_replaced()
        return is_moving and not is_bad

    def _pull_back(self, groups: dict[int, dict]) -> None:
        """Carry the gradients of the sides that move to latent factors and to Θ. `groups` are the optimizer's, by `id`."""
        scale = self.engine.gradient_scale()
        # Θ's optimizer descends: where the trainer's ascends, it sees the negative of its objective.
        signed = -scale if self.engine.maximizes() else scale
        taken = []
        for side in self._moving:
            pulled, of_own, gradient = side.pull()
            taken += pulled
            if side.coordinator is None:
                continue
            side.rate = self.engine.rate(groups[id(self.engine.holder(side.parameters[0]))])
            for parameter, value in zip(side.coordinator.parameters(), of_own, strict=True):
                parameter.grad = value / signed
            if side.follows_gradients or self._wants_cosine:
                gradient = gradient / scale
            if side.follows_gradients:
                side.observe(gradient)
            if self._wants_cosine:
                by_expert = side.map.graph.by_expert(gradient).flatten(2)
                self._cosines.append(cosines(neighbour_products(by_expert)).mean())
        self.engine.put_gradients(taken)

    def _begin(self) -> None:
        """Check at the beginning of a step that it steps what StructLoRA was attached to, and take the gates' gradients."""
        self._warn_of_other_adapters()
        self._refuse_moved()
        # In a run's first step gradients of lora_A are zero.
        self._wants_cosine = not self._cosines and self.step > 0
        missing = sum(p.grad is None for p in self.lora_parameters())
        if missing > self._missing:
            self._refuse_replaced()
        self._missing = missing
        if self.engine.has_gradients():
            self._refuse_unfrozen()
            self.gating.take_gradients(self.device)

    @in_map_context
    @torch.no_grad()
    def _after_step(self) -> None:
        """Step gates and Θ, and map what the optimizer made."""
        sides, self._now, self.gating.is_stepping = self._now, None, False
        self.engine.end_step()
        if not self._counts:
            return
        if not self._is_counted:
            self._is_counted = True
            self.gating.step()
            self.step += 1
            if self.select_step is not None and self.acted_steps >= self.select_step:
                self._select()
        self._step_theta()
        if self.step % DepthGraph.redraw_every == 0:
            for m in dict.fromkeys(side.map for side in self._moving if side.follows_gradients):
                m.graph.rebuild(
                    [s.layout.whole(s.mean) for s in self.sides if s.map is m and s.mean is not None]
                )
        for side in sides:
            # A closed direction stays so, whatever an optimizer remembers of it.
            if side in self._moving or self.has_selected:
                side.write(lambda parameter: id(parameter) in self._rests)

    def _step_theta(self) -> None:
        if self.optimizer is None:
            return
        coordinated = [side for side in self.sides if side.coordinator is not None]
        for side, group in zip(coordinated, self.optimizer.param_groups, strict=True):
            group["lr"] = self.config.coordinator_rate(side.rate.current, side.rate.peak)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _select(self) -> None:
        """Make the selection, once."""
        if self.has_selected:
            return
        passed = self.gating.nats()
        nats = torch.cat(list(passed.values()))
        chosen = self.parts.choose(nats, self.config.keep)
        kept = dict(zip(passed, chosen.split([len(x) for x in passed.values()]), strict=True))
        for m in self.maps:
            of_kind = m.selection.kept.clone()
            for place, module in enumerate(m.kind.modules):
                if unwrapped_name(module) in kept:  # what has no gate is kept
                    of_kind[place] = kept[unwrapped_name(module)]
            m.selection.close(of_kind)
        masks = [m.selection.kept for m in self.maps]
        total, left = sum(mask.numel() for mask in masks), sum(int(mask.sum()) for mask in masks)
        empty = sum(int((~mask.any(-1)).sum()) for mask in masks)
        carried = float(nats[chosen].sum() / nats.sum())
        if is_first_rank():
            logger.warning(
                "StructLoRA keeps %d of %d directions from step %d on, with %.1f %% of the nats (%d modules keep none). "
                "`structlora export ADAPTER SMALL --prune` writes the saved adapter as a small file.",
                left,
                total,
                self.acted_steps,
                100 * carried,
                empty,
            )

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold parts of each parameter: call `state_dict()`, `save_state` and `metrics()` on every rank then."""
        return self.engine.group is not None

    @property
    def has_selected(self) -> bool:
        """Whether directions were selected."""
        return self.select_step is not None and bool(self.maps[0].selection.is_made)

    @property
    def acted_steps(self) -> int:
        """Optimizer steps with gradients of the adapter: taken, or skipped for what was in them."""
        return self.step + self.skipped_steps

    @in_map_context
    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Return figures under `structlora/` (see `diagnostics`); of a detached runtime, those of before.

        Under FSDP2 and ZeRO, call it on every rank.
        """
        if self._last is not None:
            return self._last[1]
        metrics = structure_metrics(self.maps, self._factors())
        if self._cosines:
            metrics["gradient_cosine"] = torch.stack([c.to(self.device) for c in self._cosines]).mean().item()
        if self.gating.gates:
            metrics |= self.gating.metrics(self.openness())
        metrics["skipped_steps"] = self.skipped_steps
        self._cosines = []
        return {f"structlora/{name}": value for name, value in metrics.items()}

    def openness(self) -> dict[str, Tensor]:
        """Return the openness of each direction by module, (r,) in fp32 on the CPU: σ of its gate's logit, from 0 to 1; 0 where
        selection has closed it. Modules without gates are left out.
        """
        found = self.gating.openness()
        for m in self.maps if self.has_selected else ():
            for module, kept in zip(
                map(unwrapped_name, m.kind.modules), m.selection.kept.cpu(), strict=False
            ):
                if module in found:
                    found[module] *= kept
        return found

    @in_map_context
    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """Return what the run is beside the adapter and its optimizer: offsets, Θ with its optimizer's state, graphs, gates,
        selection, options and counts, as one flat dict.

        Under FSDP2 and ZeRO, call it on every rank: the ranks' parts are gathered, on the CPU. Of a detached runtime
        it is the state of before.
        """
        return self._last[0] if self._last is not None else State.of(self, self.gating.state()).flatten()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`, with the weights that stand: load the adapter and the optimizer's state first, as in a run
        of plain LoRA.

        Raises:
            StructLoRAError: the state is damaged, or of other modules, shapes, rank or options that shaped
                its weights; or the runtime is detached. Nothing has changed then.
        """
        self.restore(State.parse(state))

    @in_map_context
    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Continue from a state that has been read already; see `load_state_dict`."""
        self._refuse_detached()
        ours = State.of(self, self.gating.state())
        state.refuse_other_run(ours)
        changes = state.changes(self.config)
        if changes:
            logger.warning(
                "StructLoRA continues with other options than the state's: %s.", ", ".join(changes)
            )
        state.warn_of_other_weights(ours)
        state.load_into(self)
        self.gating.load(state.gates)
        self.step, self.skipped_steps = state.step, state.skipped_steps

    @in_map_context
    @torch.no_grad()
    def weight_norms(self) -> dict[str, Tensor]:
        """Return the norms of the factors that stand, by kind: (2,) in fp64 on the CPU. A collective where ranks hold parts."""
        return {
            kind.name: torch.stack([factor.double().norm().cpu() for factor in factors])
            for kind, factors in zip(self.kinds, self._factors(), strict=True)
        }

    def stop(self) -> None:
        """Take the hooks out of model and optimizer. State and metrics stay."""
        for handle in self._handles:
            handle.remove()
        self._close_gates()

    def detach(self) -> None:
        """Leave the model as a plain LoRA adapter, and let go of model and optimizer. State and metrics stay as they are.

        Under FSDP2 and ZeRO, call it on every rank.
        """
        if not self.is_attached:
            return
        self._last = self.state_dict(), self.metrics()
        self.stop()
        self.is_attached = False
        if self.select_step is not None and not self.has_selected and self.acted_steps:
            logger.warning(
                "keep=%r closed no direction: the weights are of step %d, and directions are selected at step %d.",
                self.config.keep,
                self.acted_steps,
                self.select_step,
            )
        # Whoever keeps the runtime for its figures does not keep the model.
        self.model = None
        self._places, self._frozen, self._layouts, self.sides = [], [], [], []
        self.engine.let_go()
        self.gating.let_go()

    def _refuse_detached(self) -> None:
        if not self.is_attached:
            raise StructLoRAError(
                "a detached runtime",
                "one that is attached; the model of a detached one is plain LoRA",
                "call `attach` again, with an optimizer of the model's parameters",
            )

    def _refuse_unfrozen(self) -> None:
        """Stop where the optimizer would move LoRA parameters that no map has."""
        unfrozen = {id(p) for p in self._frozen if p.grad is not None}
        if unfrozen and any(
            id(p) in unfrozen for group in self.engine.optimizer.param_groups for p in group["params"]
        ):
            raise StructLoRAError(
                f"{len(unfrozen)} LoRA parameters that were frozen when StructLoRA was attached, and now get gradients",
                "the same trainable LoRA parameters throughout, since others would train as plain LoRA",
                "freeze them again; or `detach()` the runtime, unfreeze them and attach again",
            )

    def _warn_of_other_adapters(self) -> None:
        """Say once of each adapter that was made active after `attach`, and has no runtime: its factors train as
        plain LoRA.
        """
        others = set(self.model.active_adapters) - self._active
        if others:
            runtimes = [r for r in list(_attached) if r.is_attached and r.model is self.model]
            others -= set().union(*(r._active for r in runtimes))
        if others:
            self._active |= others
            logger.warning(
                "Adapter %s was made active after StructLoRA was attached: what this optimizer trains of it is plain LoRA. To "
                "train it as StructLoRA, `detach()` the runtime and attach again, with `adapter_name`.",
                ", ".join(map(repr, sorted(others))),
            )

    def _refuse_moved(self) -> None:
        """Stop where the model is on another device than at `attach`."""
        if (device := self.kinds[0].device) != self.device:
            raise StructLoRAError(
                f"the adapter moved from {self.device} to {device} since StructLoRA was attached",
                "a model that stays where it is",
                "move the model first (`model.to(...)`, `accelerator.prepare`), build the optimizer, then call `attach`",
            )

    def _refuse_replaced(self) -> None:
        """Stop where the model has other LoRA parameters than those that the optimizer steps."""
        named = dict(self.model.named_parameters())
        replaced = sum(name in named and named[name] is not p for name, p in self._places)
        if replaced:
            raise StructLoRAError(
                f"{replaced} LoRA parameters of the model replaced by others since StructLoRA was attached",
                "the parameters that the optimizer steps",
                "load weights into them (`load_state_dict` without `assign=True`), or `detach()`, build the optimizer of the "
                "new ones and attach again",
            )


def save_gates(runtime: Runtime, directory: str | os.PathLike) -> Path | None:
    """Write the openness of each direction to `directory/structlora_gates.safetensors`, beside the adapter.

    `structlora export --keep` and `structlora inspect` read it; PEFT and servers ignore it. The callback writes
    it; in a loop of your own, call this where you save the adapter.

    Returns:
        `Path` of the file; None in a run without gates, in which a file of an earlier one is removed.

    Raises:
        StructLoRAError: the file cannot be written.

    Example:
        >>> runtime = attach(model, optimizer, examples=labels, batch_size=labels / len(batches))
        >>> model.save_pretrained(folder)
        >>> save_gates(runtime, folder).name
        'structlora_gates.safetensors'
    """
    if not runtime.gating.gates:
        (Path(directory) / GATES_NAME).unlink(missing_ok=True)
        return None
    of = runtime.gating.bottleneck
    facts = {"gates": runtime.config.gates, "examples": of.examples, "beta": of.beta, "step": runtime.step}
    return write_openness(directory, runtime.openness(), facts)


def _listed(names: list[str]) -> str:
    """Return names in one line that a console shows whole."""
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f", {more} more" if more > 0 else "")


def _places_of(model: nn.Module, parameters: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    ours = {id(p) for p in parameters}
    return [(name, p) for name, p in model.named_parameters() if id(p) in ours]
