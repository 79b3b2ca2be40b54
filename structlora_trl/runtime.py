"""One optimizer step: gradients are pulled back, the optimizer steps latents, effective weights are written.

Between steps the model's parameters are the adapter that will be saved. A training forward changes none of
them: gates are hooks on its activations (`core/gates.py`). Latents stand for the optimizer's step alone, and
only where a coordinator or a selection acts.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

# `torch.compiler.disable`, which would load the compiler on import.
from torch._compile import _disable_dynamo
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .config import StructLoRAConfig
from .core.diagnostics import cosines, neighbour_products, structure_metrics
from .core.kinds import SIDES, Factors, Kind, short_names, unwrapped_name
from .core.mapping import DEFAULT_PARTS, KindMap, Parts, mapped_sides
from .engines import Engine
from .engines.schedule import Rate, ScheduleShare
from .engines.slices import Slices
from .errors import StructLoRAError
from .gates_file import GATES_NAME, write_openness
from .gating import Gating
from .map_context import in_map_context
from .rank_check import is_first_rank, world_size
from .state import State
from .stopwatch import Stopwatch

logger = logging.getLogger(__name__)
_LISTED = 8  # names in a line

_attached: weakref.WeakSet[Runtime] = weakref.WeakSet()


@dataclass
class Plan:
    """What `attachment.py` found out: what is trained, and how.

    Args:
        model (`nn.Module`): the PEFT model whose parameters the kinds hold.
        kinds (`list[Kind]`): what is trained.
        config (`StructLoRAConfig`): how.
        engine (`Engine`): who owns the parameters.
        gating (`Gating`): the gates.
        quiet (`dict[str, int]`): why other modules have no gates -> number of modules.
        align (`bool`): give every node of a fresh kind (B = 0) the lora_A of the first.
        moves_base (`bool`): the adapter's start holds part of the base weights (PiSSA).
        frozen (`list[nn.Parameter]`): LoRA factors of the adapter that no map has, and must stay frozen.
        select_step (`int`, *optional*): optimizer steps, taken or skipped, after which directions are selected.
        is_over (callable, *optional*): whether the trainer's run, that this is for, has ended; None in a loop of one's
            own, where another optimizer that steps the adapter is an error.
    """

    model: nn.Module
    kinds: list[Kind]
    config: StructLoRAConfig
    engine: Engine
    gating: Gating
    quiet: dict[str, int] = field(default_factory=dict)
    align: bool = False
    moves_base: bool = False
    parts: Parts = DEFAULT_PARTS
    frozen: list[nn.Parameter] = field(default_factory=list)
    select_step: int | None = None
    is_over: Callable[[], bool] | None = None


class _Pulled(NamedTuple):
    """What the pullback of one kind gave: gradients of latent factors, of the map's parameters (this rank's
    share, where factors are slices), and gradients of node features by side, where they are wanted.
    """

    factors: Factors
    own: dict[str, Tensor]
    features: dict[str, Tensor]


class Runtime:
    """StructLoRA on one adapter and one optimizer. `attach` builds it.

    Attributes:
        step (`int`): optimizer steps that counted.
        skipped_steps (`int`): optimizer steps skipped for NaN or Inf in the gradients. In a loop of your own,
            those that a GradScaler leaves out are not among them: it never calls an unfused optimizer then.
        reached_steps (`int`): optimizer steps with gradients of the adapter, if only zeros.
        gating (`Gating`): the gates.
        is_attached (`bool`): whether the model and its optimizer are still in use.
        maps (`list[KindMap]`): one per kind.
        schedule (`ScheduleShare`): where the learning rates' schedule stands.
        has_aligned (`bool`): whether attaching changed lora_A, of a fresh adapter.

    Example:
        >>> runtime = attach(model, optimizer, examples=labels, batch_size=labels / len(batches))
        >>> "structlora/effective_rank" in runtime.metrics()
        True
        >>> runtime.detach()  # the model keeps its weights: a plain LoRA adapter
    """

    def __init__(self, plan: Plan):
        self.plan, self.model, self.kinds, self.config = plan, plan.model, plan.kinds, plan.config
        self.engine, self.device = plan.engine, plan.kinds[0].device
        self.stopwatch = Stopwatch(self.device)
        self.is_attached, self.gating = True, plan.gating
        self.step = self.skipped_steps = self.hook_calls = self.reached_steps = 0
        self.schedule = ScheduleShare()
        self.maps: list[KindMap] = []
        self._rate: Rate | None = None  # of the step under way, where it counts
        self._cosine: Tensor | None = None  # of gradients, in the first step since the last `metrics()`
        self._metric_steps = 0
        self._parameter_ids = {id(p) for p in self.lora_parameters() if p.requires_grad}
        self._places = _places_of(self.model, self.lora_parameters())
        self._active = set(self.model.active_adapters)
        mapped = [mapped_sides(kind, self.config) for kind in self.kinds]
        self._maps_anything = any(mapped)
        self.engine.install(self._before_step, self._after_step, mapped)
        try:
            self._build(plan.align)
            close = self.gating.install(self.model)
        except BaseException:
            self.engine.remove()
            raise
        # A model outlives a run that nobody ended: its gates go with the runtime.
        self._let_go = weakref.finalize(self, close)
        self._let_go.atexit = False
        _watch_optimizers()
        _attached.add(self)

    def lora_parameters(self) -> list[nn.Parameter]:
        """The LoRA parameters that are trained; the maps' own are `parameters()` of each in `maps`."""
        return [p for kind in self.kinds for p in kind.parameters]

    @in_map_context
    @torch.no_grad()
    def _build(self, align: bool) -> None:
        """Build maps and optimizer from the factors that stand, and align those factors where asked."""
        latents = self.engine.read_latents(everything=True)
        aligned = self._to_align(latents) if align else [False] * len(self.kinds)
        starts = [  # aligned: the first lora_A at all depths, and of all experts
            Factors(f.A[:1].expand_as(f.A).clone(), f.B) if same else f
            for f, same in zip(latents, aligned, strict=True)
        ]
        self.maps = [
            self._map(*of_kind)
            for of_kind in zip(self.kinds, starts, aligned, self.engine.slices, strict=True)
        ]
        self._optimizer = _small_optimizer(self.maps)
        self.has_aligned = any(aligned)
        if self.has_aligned:
            self.engine.write_latents(starts)
        self._write()

    def _to_align(self, latents: list[Factors]) -> list[bool]:
        """The kinds whose lora_A may be aligned, of a fresh adapter: lora_A is trained, and lora_B is zero.

        An adapter is fresh where no kind adds anything. Where one does, a kind without any direction has lost
        them to selection, and what stands in its lora_A was trained.
        """
        empty = torch.stack([~factor.any().to(self.device) for factors in latents for factor in factors])
        empty = self._slices.every(empty).view(-1, len(SIDES))
        if not bool(empty.any(-1).all()):
            return [False] * len(self.kinds)
        return [
            is_empty and not kind.is_vera and kind.A[0].requires_grad
            for kind, is_empty in zip(self.kinds, empty[:, SIDES.index("B")].tolist(), strict=True)
        ]

    def _map(self, kind: Kind, start: Factors, aligned: bool, slices: Slices) -> KindMap:
        A = start.A[:1] if aligned else start.A
        B = start.B.clone() if self.plan.moves_base or kind.is_vera else None
        m = KindMap(kind, self.config, A.clone(), B, self.plan.parts)
        for part in m.modules():
            if hasattr(part, "sum_over_width"):
                part.sum_over_width = slices.sum_with_gradient
        return m

    @staticmethod
    def attached_to(parameters: set[int]) -> list[Runtime]:
        """The runtimes that train some of the parameters with these ids."""
        return [r for r in list(_attached) if r.is_attached and not parameters.isdisjoint(r._parameter_ids)]

    def is_run_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer is the one that it was attached to, in a run that is not over."""
        is_over = self.plan.is_over
        return self.engine.optimizer is optimizer and (is_over is None or not is_over())

    def end_for(self, optimizer: torch.optim.Optimizer) -> None:
        """Another optimizer steps the adapter, or the runtime's own in a later run: stop, or let go of it.

        Raises:
            StructLoRAError: this is in a loop of one's own, which is not known to be over.
        """
        which = "of a later run" if optimizer is self.engine.optimizer else "another optimizer"
        found = f"{type(optimizer).__name__}, {which}, stepping the adapter that StructLoRA is attached to"
        if self.plan.is_over is None:
            raise StructLoRAError(
                found,
                f"steps of the {type(self.engine.optimizer).__name__} that it was attached to",
                "call `runtime.detach()` to train on as plain LoRA, and `attach` again to train on as StructLoRA",
            )
        logger.warning(
            "StructLoRA found %s: its run is over. Its gates were in the forward of this step; training goes on as plain LoRA.",
            found,
        )
        self.detach()

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
        step = self.plan.select_step
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
        off = [f"no gates on {count} modules ({why})" for why, count in self.plan.quiet.items()]
        return "; ".join(on + off)

    @in_map_context
    def _before_step(self) -> bool:
        """Carry the gradients back through the map. False where the optimizer must not step."""
        self.hook_calls += 1
        self._rate = None
        self._warn_of_other_adapters()
        self._refuse_moved()
        gradients = self.engine.read_gradients()
        if gradients is None:  # no backward has reached the adapter
            self._refuse_replaced()
            return True
        self.reached_steps += 1
        self._refuse_unfrozen()
        self.gating.take_gradients(self.device)
        if not self._maps_anything:
            self._rate = self.engine.learning_rate()
            return True
        scale = self.engine.gradient_scale()
        pulled = [
            self._pull(m, *parts, scale)
            for m, *parts in zip(self.maps, self.engine.read_latents(), gradients, strict=True)
        ]
        is_bad, is_moving, is_written, own = self._sum(pulled)
        if is_written:
            self._refuse_written()
        if not is_moving:
            # What `zero_grad(set_to_none=False)` leaves, and what torch's distributed checkpoints have an
            # optimizer step with.
            return True
        if is_bad:
            self.skipped_steps += 1
            logger.warning(
                "Gradients hold NaN or Inf: step skipped, nothing changed (%d skipped so far).",
                self.skipped_steps,
            )
            return False
        for m, part, values in zip(self.maps, pulled, own, strict=True):
            for name, value in values.items():
                m.get_parameter(name).grad = value
            if m.coordinators and m.graph.follows_gradients:
                m.graph.observe(part.features)
        self.engine.write_gradients(
            [part.factors for part in pulled], [bool(m.coordinators) for m in self.maps]
        )
        self._rate = self.engine.learning_rate()
        return True

    def _pull(self, m: KindMap, latent: Factors, gradient: Factors, scale: float | Tensor) -> _Pulled:
        """One kind's gradients, carried back through its map. `scale` is the loss scale of mixed precision."""
        scale = scale.to(m.kind.device) if isinstance(scale, Tensor) else scale
        # The maps' own optimizer descends: where the trainer's ascends, it sees the negative of its objective.
        sign = -1 if self.engine.maximizes() else 1
        factors, own = m.pullback(latent, gradient) if m.coordinators else (m.masked(gradient), {})
        wanted = m.coordinators and (self._wants_cosine() or m.graph.follows_gradients)
        return _Pulled(
            factors,
            {name: sign * value / scale for name, value in own.items()},
            # Unscaled and clipped, whichever engine. Closed directions are masked out of what joins depths.
            {side: getattr(m.masked(gradient), side) / scale for side in m.coordinators} if wanted else {},
        )

    def _wants_cosine(self) -> bool:
        """In the first step of a run gradients of lora_A are zero."""
        return self._cosine is None and self.step > 0

    def _sum(self, pulled: list[_Pulled]) -> tuple[bool, bool, bool, list[dict[str, Tensor]]]:
        """Sum over ranks what a step needs, in one collective, the one place where it waits for the device.

        Returns:
            Whether gradients are bad, whether one is other than zero, whether weights were written, each on
            some rank; and gradients of the maps' parameters.
        """
        products = [
            neighbour_products(
                torch.cat([m.graph.by_expert(g).flatten(2) for g in part.features.values()], dim=-1)
            )
            for m, part in zip(self.maps, pulled, strict=True)
            if self._wants_cosine() and part.features
        ]
        own = [value for part in pulled for value in part.own.values()]
        flags = self.engine.gradient_flags()
        flags = torch.cat([flags, self.engine.written().to(flags)[None]])
        flags, *sums = self._slices.sums([flags, *own, *products])
        is_bad, is_moving, is_written = flags.bool().tolist()
        sums = iter(sums)
        own = [{name: next(sums) for name in part.own} for part in pulled]
        if products and not is_bad:
            self._cosine = torch.stack([cosines(p).mean().to(self.device) for p in sums]).mean()
        return is_bad, is_moving, is_written, own

    @in_map_context
    def _after_step(self, stepped: bool) -> None:
        """Step Θ where the optimizer stepped, then put the new effective weights in place."""
        if self._rate is not None and not stepped:  # an overflow that only the engine saw
            self.skipped_steps += 1
            self._rate = None
        try:
            if self._rate is not None:
                self._count_step()
        finally:  # the optimizer has stepped, whatever broke off
            if self._maps_anything:
                self._write()

    def _count_step(self) -> None:
        share = self.schedule.advance(self._rate)
        self._rate = None
        if self._optimizer:
            (group,) = self._optimizer.param_groups
            group["lr"] = self.config.coordinator_rate(self.schedule.peak) * share
            self._optimizer.step()
            self._optimizer.zero_grad()
        self.gating.step()
        self.step += 1
        self._metric_steps += 1
        if self.plan.select_step is not None and self.acted_steps >= self.plan.select_step:
            self._select()
        graphs = [m.graph for m in self.maps if m.coordinators and m.graph.follows_gradients]
        graphs = [graph for graph in graphs if self.step % graph.redraw_every == 0]
        products = self._slices.sums([graph.gradient_products() for graph in graphs])
        for graph, of_graph in zip(graphs, products, strict=True):
            graph.rebuild(of_graph)

    def _select(self) -> None:
        """Make the selection, once."""
        if self.has_selected:
            return
        passed = self.gating.nats()
        nats = torch.cat(list(passed.values()))
        chosen = self.plan.parts.choose(nats, self.config.keep)
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

    @torch.no_grad()
    def _write(self) -> None:
        latents = self.engine.read_latents()
        self.engine.write_working([m(latent) for m, latent in zip(self.maps, latents, strict=True)])

    @property
    def _slices(self) -> Slices:
        return self.engine.slices[0]  # the ranks are the same for every kind

    @property
    def is_sharded(self) -> bool:
        """Whether ranks have slices: call `state_dict()`, `save_state` and `metrics()` on every rank then."""
        return self._slices.is_shared

    @property
    def has_selected(self) -> bool:
        """Whether directions were selected."""
        return self.plan.select_step is not None and bool(self.maps[0].selection.is_made)

    @in_map_context
    def is_rewritten(self) -> bool:
        """Whether other code has written weights since the last step, which the next one would refuse to drop."""
        return not bool(self._slices.every(self.engine.written() == 0))

    @property
    def acted_steps(self) -> int:
        """Optimizer steps with gradients of the adapter: taken, or skipped for what was in them."""
        return self.step + self.skipped_steps

    @in_map_context
    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Figures under `structlora/` (see `diagnostics`); `map_ms` is a mean over steps since the last call.

        Under FSDP2 and ZeRO, call it on every rank.
        """
        metrics = structure_metrics(self.maps, self.engine.read_working(), self._slices.sums)
        if self._cosine is not None:
            metrics["gradient_cosine"] = self._cosine.item()
        if self.gating.gates:
            metrics |= self.gating.metrics(self.openness())
        metrics["peak_lr"] = self.schedule.peak
        metrics["skipped_steps"] = self.skipped_steps
        metrics["map_ms"] = self.stopwatch.take() / max(self._metric_steps, 1)
        self._metric_steps, self._cosine = 0, None
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
    def state_dict(self) -> dict[str, Tensor]:
        """Latents, Θ with its optimizer's state, graphs, gates, selection, options and counts, as one flat dict.

        Under FSDP2 and ZeRO, call it on every rank: the ranks' slices are gathered, on the CPU.
        """
        counts = {"step": self.step, "skipped_steps": self.skipped_steps}
        latents = self.engine.read_latents(everything=True)
        kinds = zip(self.maps, latents, self.engine.slices, strict=True)
        gates = self.gating.state()
        return State.of(self.config, counts, self.schedule, kinds, self._optimizer, gates).flatten()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`: afterwards the model's trained LoRA factors are that state's. What else an adapter
        trains (DoRA's magnitudes, VeRA's λ_b, biases, `modules_to_save`) comes from its own file.

        Raises:
            StructLoRAError: the state is damaged, or of other modules, shapes, rank or options that shaped
                its weights; or the runtime is detached. Nothing has changed then.
        """
        self.restore(State.parse(state))

    @in_map_context
    def restore(self, state: State) -> None:
        """Continue from a state that has been read already; see `load_state_dict`."""
        self._refuse_detached()
        latents = self.engine.read_latents(everything=True)
        kinds = list(zip(self.maps, latents, self.engine.slices, strict=True))
        state.refuse_other_run(self.config, self.maps)
        for m, latent, slices in kinds:
            state.refuse_misfits(m, slices, latent)
        self.gating.refuse_misfits(state.gates)
        changes = state.changes(self.config)
        if changes:
            logger.warning(
                "StructLoRA continues with other options than the state's: %s.", ", ".join(changes)
            )
        self.engine.write_latents([state.load_into(m, slices, self._optimizer) for m, _, slices in kinds])
        self.step, self.skipped_steps, self.schedule = state.step, state.skipped_steps, state.schedule
        self.gating.load(state.gates)
        self._write()

    @in_map_context
    def reload(self) -> None:
        """Start again from the LoRA weights that stand in the model, which other code has written.

        They become the latent factors. Coordinator, graph and their optimizer
        start anew, as at `attach`; the gates and the step's number go on. Directions that selection has closed
        stay closed. To continue a run of StructLoRA, use `load_state` instead.

        Raises:
            StructLoRAError: the runtime is detached.
        """
        self._refuse_detached()
        self.engine.write_latents(self.engine.read_working())
        kept = [m.kept for m in self.maps]
        self._build(align=False)
        for m, of_kind in zip(self.maps, kept, strict=True):
            if of_kind is not None:
                m.selection.close(of_kind)
        self._write()
        self.schedule = ScheduleShare()

    @in_map_context
    def detach(self) -> None:
        """Leave the model as a plain LoRA adapter, and let go of model and optimizer.

        A detached runtime keeps its state (`state_dict()`, `metrics()`). Once detached, it does nothing.
        """
        if not self.is_attached:
            return
        self.is_attached = False
        self.engine.remove()
        self._let_go()
        if self.plan.select_step is not None and not self.has_selected and self.acted_steps:
            logger.warning(
                "keep=%r closed no direction: the weights are of step %d, and directions are selected at step %d.",
                self.config.keep,
                self.acted_steps,
                self.plan.select_step,
            )
        # Whoever keeps the runtime for its state or figures does not keep the model.
        self.model = self.plan.model = self.plan.is_over = None
        self._places, self.plan.frozen = [], []
        self.gating.let_go()

    def _refuse_detached(self) -> None:
        if not self.is_attached:
            raise StructLoRAError(
                "a detached runtime that is to write weights",
                "one that is attached; a detached one keeps its state and its metrics, and its model is plain LoRA",
                "call `attach` again, with an optimizer of the model's parameters",
            )

    def _refuse_unfrozen(self) -> None:
        """Stop where the optimizer would move LoRA parameters that no map has."""
        unfrozen = {id(p) for p in self.plan.frozen if p.grad is not None}
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

    def _refuse_written(self) -> None:
        raise StructLoRAError(
            "LoRA weights that other code has written since the last optimizer step, which this step would drop",
            "the weights that StructLoRA put there; values that are swapped out (a moving average, say) must be back before "
            "`optimizer.step()`",
            "call `runtime.reload()` after the write, to train on from what stands, or load the run's own state after it "
            "(`load_state`, or `accelerator.register_for_checkpointing(runtime)`). Accelerate's LocalSGD, which averages "
            "weights between steps, needs `coordinator='none'` and no `keep`",
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


def _watch_optimizers() -> None:
    """From now on, notice every optimizer that steps an adapter of a runtime, and is not the runtime's own."""
    if _watching:
        return
    calls: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    @_disable_dynamo
    def before(optimizer, *_):
        ids = (
            {id(p) for group in optimizer.param_groups for p in group["params"]} if len(_attached) else set()
        )
        calls[optimizer] = []
        for runtime in list(_attached):
            # An optimizer within the runtime's steps with it.
            if not runtime.is_attached or runtime.engine.is_stepping:
                continue
            if runtime.is_run_by(optimizer):
                continue
            if runtime.engine.optimizer is optimizer or runtime.engine.is_replaced:
                runtime.end_for(optimizer)
            elif not ids.isdisjoint(runtime._parameter_ids):
                calls[optimizer].append((weakref.ref(runtime), runtime.hook_calls))

    @_disable_dynamo
    def after(optimizer, *_):
        for reference, seen in calls.pop(optimizer, []):
            runtime = reference()
            # An optimizer around the runtime's (SAM, say) steps with it.
            if runtime is not None and runtime.is_attached and runtime.hook_calls == seen:
                runtime.end_for(optimizer)

    _watching.extend([register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)])


_watching: list = []  # handles of the hooks that see every optimizer


def _listed(names: list[str]) -> str:
    """Return names in one line that a console shows whole."""
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f", {more} more" if more > 0 else "")


def _places_of(model: nn.Module, parameters: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    ours = {id(p) for p in parameters}
    return [(name, p) for name, p in model.named_parameters() if id(p) in ours]


def _small_optimizer(maps: list[KindMap]) -> torch.optim.AdamW | None:
    """The AdamW of Θ, equal on every rank; None where there is none. Each step sets its rate."""
    weights = [parameter for m in maps for parameter in m.coordinators.parameters()]
    return torch.optim.AdamW(weights, weight_decay=0.0) if weights else None
