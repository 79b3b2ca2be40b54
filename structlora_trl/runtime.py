"""The runtime drives a step: it owns the maps, the gate noise, the small AdamW of logits and Θ, and which weights stand.

Between optimizer steps the model holds evaluation weights: deterministic, what is saved and measured. A training forward
puts the noisy training weights of the coming step in place; the step refuses gradients of any others. Readers in between
see evaluation weights (`watch.py`). Weights that someone else wrote become the latents, or stop the run.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .config import StructLoRAConfig
from .core.diagnostics import structure_metrics
from .core.inverse import latents_of
from .core.mapping import (
    DEFAULT_PARTS,
    SIDES,
    Factors,
    KindMap,
    Parts,
    first_everywhere,
    maps_by_row,
    moved_sides,
)
from .core.nodes import Kind
from .core.regularizers import cosines, neighbour_products
from .core.stopwatch import Stopwatch
from .core.width import Width
from .engines import Engine, world_size
from .engines.schedule import Rate, ScheduleShare
from .errors import StructLoRAError
from .state import KindState, State
from .watch import Watch

logger = logging.getLogger(__name__)

DEFAULT_SEED = 42
# Which weights stand in the model; latent ones do during an optimizer step, and after one that an exception broke off.
EVALUATION, TRAINING, LATENT = "evaluation", "training", "latent"


class _Pulled(NamedTuple):
    """What the pullback of a kind's gradients gave: of latent factors and of the map's own parameters (this rank's share, where
    ranks share the width), and the gradients that the graph is to see."""

    factors: Factors
    own: dict[str, Tensor]
    seen: Tensor | None


def _timed(method: Callable) -> Callable:
    """Count a method's time as the map's."""

    @functools.wraps(method)
    def timed(self, *args):
        with self._stopwatch:
            return method(self, *args)

    return timed


class Runtime:
    """StructLoRA on one adapter and one optimizer.

    Args:
        model (`nn.Module`): the model whose parameters the kinds hold; None once detached.
        kinds (`list[Kind]`): what is trained.
        config (`StructLoRAConfig`): how.
        engine (`Engine`): who owns the parameters.
        seed (`int`, *optional*, defaults to 42): of the gate noise, where the config names none.
        align (`bool`, *optional*, defaults to False): give every depth of a fresh kind (B = 0) the lora_A of the first.
        absorbs_base (`bool`, *optional*, defaults to False): the adapter's start holds part of the base weights (PiSSA).
        parts (`Parts`, *optional*): what to build the maps and the noise of, where that is not the package's own.
        quiet (`str`, *optional*): why `noise='auto'` is off in this run; where omitted, it is on.
        frozen (`list[nn.Parameter]`, *optional*): the adapter's LoRA factors that must stay frozen, since no map has them.
        watched (`tuple[nn.Module]`, *optional*): the modules by which callers reach the weights; none is watched by default.

    Attributes:
        weights (`str`): which weights stand in the model: 'evaluation', 'training' or, during an optimizer step, 'latent'.

    Example:
        >>> runtime = attach(model, optimizer)
        >>> "structlora/effective_rank" in runtime.metrics()
        True
        >>> runtime.detach()  # the model keeps the evaluation weights: a plain LoRA adapter
    """

    def __init__(
        self,
        model: nn.Module,
        kinds: list[Kind],
        config: StructLoRAConfig,
        engine: Engine,
        seed: int = DEFAULT_SEED,
        align: bool = False,
        absorbs_base: bool = False,
        parts: Parts = DEFAULT_PARTS,
        quiet: str | None = None,
        frozen: list[nn.Parameter] | None = None,
        watched: tuple[nn.Module, ...] = (),
    ):
        self.model, self.kinds, self.config, self.engine = model, kinds, config, engine
        self.seed = seed if config.seed is None else config.seed
        self.noise = parts.noise(self.seed)
        self.quiet = {"on": None, "off": "as configured", "auto": quiet}[config.noise]
        self.step = 0
        self.skipped_steps = 0
        self.hook_calls = 0
        self.weights = EVALUATION
        self._trained = False  # whether training weights have stood since the last step
        self._adopted = False  # whether weights of others were ever taken over
        self._frozen = frozen or []
        ours = {id(p) for p in self.lora_parameters()}
        self._names = {name: p for name, p in model.named_parameters() if id(p) in ours}
        self._owners = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if id(p) in ours]
        self.is_attached = True
        self.on_detach: list[Callable[[], None]] = []  # called when `detach()` is done
        with ExitStack() as on_error:
            moved = [moved_sides(kind, config, parts) for kind in kinds]
            # Not of an adapter that starts with part of the base weights: that part is kept in slices.
            by_row = [maps_by_row(kind, config, parts) and not absorbs_base for kind in kinds]
            engine.install(self._before_step, self._after_step, moved, by_row)
            on_error.callback(engine.remove)
            if align:
                self._align()
            self.maps = [
                KindMap(
                    kind, config, _origin(latent.A, width), latent.B.clone() if absorbs_base else None, parts, width
                )
                for kind, latent, width in zip(kinds, engine.read_latents(everything=True), engine.widths, strict=True)
            ]
            self._width = engine.widths[0]  # the ranks are the same for every kind
            self._gate_count = sum(m.gate_count for m in self.maps)
            self._gate_parameters = [logits for m in self.maps for logits in m.gate_logits.values()]
            # The factors that gates act on.
            self._noisy = SIDES if any(m.heads and m.heads.side == "A" for m in self.maps) else ("B",)
            self._coordinator_parameters = [p for m in self.maps for p in m.coordinators.parameters()]
            # A CPU's allocator takes what is large from the system anew each time, page by page: there it is kept.
            self._kept = {kind.name: {} for kind in kinds if kind.device.type == "cpu"}
            self._optimizer = self._build_optimizer()
            self._rate: Rate | None = None  # set while a step that counts is under way
            self.schedule = ScheduleShare()
            self._stopwatch = Stopwatch(kinds[0].device)
            self._cosine: Tensor | None = None  # of gradients, in the first step since the last `metrics()`
            self._metric_steps = 0
            engine.stamp()
            self._watch = Watch(self, watched)
            on_error.pop_all()

    def __repr__(self) -> str:
        """What acts, in one line: engine (with its stage), processes, kinds and depths, gates, noise, edges."""
        depths = ", ".join(f"{kind.name} x{kind.depth_count}" for kind in self.kinds)
        config = self.config
        gates = sum(logits.numel() for logits in self._gate_parameters)
        edges = sum(int(m.graph.edges.sum()) // 2 for m in self.maps if m.coordinators)
        graph = "" if config.coordinator == "none" else f" ({edges} edges, {config.edges})"
        noise = f", noise off ({self.quiet})" if self.quiet else ", noise on"
        noise = noise if self.maps[0].filter.is_stochastic else ""
        return (
            f"StructLoRA on {self.engine.name}, {world_size()} process{'es' if world_size() > 1 else ''}: "
            f"{len(self.kinds)} kinds ({depths}), filter {config.filter} ({gates} gates){noise}, "
            f"coordinator {config.coordinator}{graph}, seed {self.seed}"
        )

    @property
    def is_noisy(self) -> bool:
        """Whether training weights differ from evaluation weights."""
        return self.maps[0].filter.is_stochastic and self.quiet is None

    def train(self) -> None:
        """Put the training weights of the coming step in place (the same ones until the step is done)."""
        if self.weights == TRAINING:
            if self.engine.was_touched():
                raise StructLoRAError(
                    "LoRA weights that changed since the last training forward, without a step of the optimizer that StructLoRA "
                    f"was attached to ({type(self.engine.optimizer).__name__})",
                    "that optimizer's `step` between training forwards at different weights",
                    "attach to the optimizer whose `step` is called; to write weights yourself in the middle of a step, use "
                    "`load_state_dict`, or call `runtime.eval()` first",
                )
            self._trained = True
            return
        self._trained = True
        self._adopt()
        if self.weights == LATENT:
            self._write(self._noise())
        elif self.is_noisy:
            self._write(self._noise(), self._noisy)
        self.weights = TRAINING

    def eval(self) -> None:
        """Put the evaluation weights in place. After a step that an exception broke off, those of before that step."""
        if self.weights == EVALUATION or self._adopt():
            return
        if self.weights == LATENT:
            self._write(None)
        elif self.is_noisy:
            self._write(None, self._noisy)
        self.weights = EVALUATION

    def begin_visit(self) -> ExitStack | None:
        """Put evaluation weights in place for a reader. Where a backward may still need the training weights that stood,
        returns what `end_visit` puts them back with."""
        if self.weights != TRAINING or self._adopt():
            self.eval()
            return None
        versions = self.engine.keep_versions()
        self.eval()
        return versions

    def end_visit(self, versions: ExitStack) -> None:
        """Put the training weights back as the visit found them."""
        if self.weights == EVALUATION and not self._adopt():
            self.train()
            versions.close()
            self.engine.stamp()

    def detach(self) -> None:
        """Leave the model with evaluation weights, a plain LoRA adapter, and let go of model and optimizer.

        Once detached, it does nothing.
        """
        if not self.is_attached:
            return
        self.eval()
        self.engine.remove()
        self._watch.remove()
        self.is_attached = False
        # Whoever keeps the runtime for its state or figures does not keep the model.
        self.model, self._owners = None, []
        for call in self.on_detach:
            call()

    def lora_parameters(self) -> list[nn.Parameter]:
        """The model's LoRA parameters that the maps have; the maps' own are `parameters()` of each in `maps`."""
        return [p for kind in self.kinds for p in (*kind.A, *kind.B)]

    @property
    def is_sharded(self) -> bool:
        """Whether ranks share the map: `state_dict()`, `save_state` and `metrics()` are to be called on every rank then."""
        return self._width.is_shared

    @property
    def acted_steps(self) -> int:
        """Optimizer steps with gradients of the adapter: taken, or skipped for what was in them."""
        return self.step + self.skipped_steps

    @property
    def shows_evaluation_weights(self) -> bool:
        """Whether what stands in the model is what a reader should see."""
        return self.weights == EVALUATION or (self.weights == TRAINING and not self.is_noisy)

    def evaluation_values(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each LoRA parameter with its evaluation value, as the model would hold it."""
        self._adopt()
        yield from self.engine.stored(self.evaluation_factors())

    def evaluation_factors(self) -> list[Factors]:
        """Effective factors without noise, one per kind, fp32; this rank's slices under an engine that shards the map."""
        return self._effective(None, everything=True)

    def metrics(self) -> dict[str, float]:
        """Figures under `structlora/` (see `diagnostics`); `map_ms` is a mean over the steps since the last call. Under FSDP2
        and ZeRO, call it on every rank."""
        self._adopt()
        found = structure_metrics(self.maps, self.evaluation_factors())
        if self._cosine is not None:
            found["gradient_cosine"] = self._cosine.item()
        found["map_ms"] = self._stopwatch.take() / max(self._metric_steps, 1)
        found["skipped_steps"] = self.skipped_steps
        self._metric_steps = 0
        self._cosine = None
        return {f"structlora/{name}": value for name, value in found.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Latents, logits, Θ, their optimizer's state, graphs, options and the step that seeds the noise, as one flat dict.

        Under FSDP2 and ZeRO, call it on every rank: the ranks' slices are gathered, on the CPU.
        """
        self._adopt()
        kinds = {
            m.kind.name: KindState.of(m, latent, self._optimizer)
            for m, latent in zip(self.maps, self.engine.read_latents(everything=True), strict=True)
        }
        return State(self.config.options(), self.seed, self.step, self.skipped_steps, self.schedule, kinds).flatten()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`: afterwards the model holds that state's evaluation weights.

        Raises:
            StructLoRAError: the state is damaged, or of other modules, shapes, rank or options that shaped its weights.
                Nothing has changed then.
        """
        self.restore(State.parse(state))

    def restore(self, state: State) -> None:
        """`load_state_dict` of a state that has been read already."""
        state.refuse_other_run(self.config.options(), self.maps)
        kinds = [state.kinds[m.kind.name] for m in self.maps]
        for m, kind, latent in zip(self.maps, kinds, self.engine.read_latents(everything=True), strict=True):
            kind.refuse_other_parts(m.kind.name, m, latent, state.step)
        changes = state.changes(self.config.options(), self.seed)
        if changes:
            logger.warning("StructLoRA continues with other options than the state's: %s.", ", ".join(changes))
        latents = [m.restore(kind.latent, kind.own, kind.graph) for m, kind in zip(self.maps, kinds, strict=True)]
        self.engine.write_latents(latents)
        self._restore_moments(kinds)
        self.step, self.skipped_steps, self.schedule = state.step, state.skipped_steps, copy.copy(state.schedule)
        self._write(None)
        self.weights, self._trained = EVALUATION, False

    def _restore_moments(self, kinds: list[KindState]) -> None:
        if self._optimizer is None:
            return
        place = {p: i for i, p in enumerate(p for group in self._optimizer.param_groups for p in group["params"])}
        moments = {
            place[m.get_parameter(name)]: {key: value.clone() for key, value in moment.items()}
            for m, kind in zip(self.maps, kinds, strict=True)
            for name, moment in kind.moments.items()
        }
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})

    @_timed
    def _before_step(self) -> bool:
        """Carry the gradients back through the map. False where the optimizer must not step."""
        self.hook_calls += 1
        self._rate = None
        self.refuse_replaced()
        gradients = self.engine.read_gradients()
        if gradients is None or (not self._trained and self._are_zeros(gradients)):
            # No backward has run: there is nothing to step, with or without us. Zeros are what `zero_grad(set_to_none=False)`
            # leaves, and what torch's distributed checkpoints have an optimizer step with.
            self._refuse_replaced_by_name()
            self._adopt()
            self.weights, self._trained = LATENT, False
            return True
        self._refuse_step()
        written = self.engine.written() if self.weights == TRAINING else torch.zeros((), device=self.kinds[0].device)
        scale = self.engine.gradient_scale()
        latents = self.engine.read_latents()
        pulled = [
            self._pull(m, latent, gradient, noise, scale, rows)
            for m, latent, gradient, noise, rows in zip(
                self.maps, latents, gradients, self._noise(), self.engine.rows, strict=True
            )
        ]
        bad, written, own, products = self._summed(pulled, written)
        if written:
            self.engine.was_written()  # some engines refuse it in words of their own
            self._refuse_written()
        self.weights, self._trained = LATENT, False
        if bad:
            self.skipped_steps += 1
            logger.warning(
                "Gradients hold NaN or Inf: step skipped, nothing changed (%d skipped so far).", self.skipped_steps
            )
            return False
        if products:
            means = [cosines(product).mean().to(products[0].device) for product in products]
            self._cosine = torch.stack(means).mean()
        for m, part, task in zip(self.maps, pulled, own, strict=True):
            for name, value in m.objective_gradients(task, self.config.kl_weight / self._gate_count).items():
                m.get_parameter(name).grad = value
            if part.seen is not None and m.coordinators and m.graph.follows_gradients:
                m.graph.observe(part.seen)
        self.engine.write_gradients([part.factors for part in pulled], fill_missing=self.config.compares_depths)
        self._rate = self.engine.learning_rate()
        return True

    def _pull(
        self,
        m: KindMap,
        latent: Factors,
        gradient: Factors,
        noise: Tensor | None,
        scale: float | Tensor,
        rows: list[int] | None,
    ) -> _Pulled:
        """One kind's gradients, carried back through its map."""
        scale = scale.to(m.kind.device) if isinstance(scale, Tensor) else scale
        # The maps' own optimizer descends: where the trainer's ascends, they see the negative of its objective.
        ascends = self.engine.maximizes()
        given, kept = _negative(gradient) if ascends else gradient, self._kept.get(m.kind.name)
        factors, own = m.pullback(latent, given, noise, scale, kept, rows)
        if (penalty := m.regularizer_gradient(latent)) is not None:
            factors = Factors(*(f + scale * p for f, p in zip(factors, penalty, strict=True)))
        # Gradients on the sides that are compared, (L, n): unscaled and clipped, whichever engine.
        wanted = self._cosine is None or (m.coordinators and m.graph.follows_gradients)
        is_there = m.sees_gradients and (rows is None or "B" not in m.sides)
        seen = m.side_gradients(gradient) / scale if wanted and is_there else None
        return _Pulled(_negative(factors) if ascends else factors, own, seen)

    def _summed(
        self, pulled: list[_Pulled], written: Tensor
    ) -> tuple[bool, bool, list[dict[str, Tensor]], list[Tensor]]:
        """Whether the gradients are bad and weights `written` on some rank, gradients of the maps' parameters, and, where a metric
        is to be made of them, products of what was seen (see `neighbour_products`): a sum over the slices of all ranks, in one
        collective, and the one place where a step waits for the device."""
        seen = [part.seen for part in pulled if part.seen is not None] if self._cosine is None else []
        own = [value for part in pulled for value in part.own.values()]
        bad = self.engine.bad_gradients()
        flags = torch.stack([bad, written.to(bad.device, bad.dtype)])
        flags, *sums = self._width.sums([flags, *own, *map(neighbour_products, seen)])
        is_bad, is_written = flags.bool().tolist()
        sums = iter(sums)
        summed = [{name: next(sums) for name in part.own} for part in pulled]
        return is_bad, is_written, summed, list(sums)

    @_timed
    def _after_step(self, stepped: bool) -> None:
        """Step logits and Θ where the optimizer stepped, then put the new evaluation weights in place."""
        if self._rate is not None and not stepped:  # an overflow that only the engine saw
            self.skipped_steps += 1
            self._rate = None
        if self._rate is not None:
            share = self.schedule.advance(self._rate)
            if self._optimizer:
                for group in self._optimizer.param_groups:
                    group["lr"] = group["base_lr"] * share
                self._optimizer.step()
                self._optimizer.zero_grad()
            self.step += 1
            self._metric_steps += 1
            if self.step % self.config.semantic_every == 0:
                for m in self.maps:
                    if m.coordinators:
                        m.graph.rebuild(m.width)
            self._rate = None
        self._write(None)
        self.weights = EVALUATION

    def _refuse_step(self) -> None:
        """Stop where the gradients are not of what the maps made, or would move what no map has."""
        if not self._trained:
            raise StructLoRAError(
                "an optimizer step on gradients taken at the evaluation weights",
                "a forward at the training weights before each step, that is, one under `model.train()`",
                "call `model.train()` before the forward (`runtime.train()` where it is not one of the PEFT model or its base "
                "model); to train without dropout, set its probability to 0, or put the dropout modules alone into `eval()`",
            )
        if self.weights != TRAINING and self._adopt():
            self._refuse_written()
        moved = {id(p) for p in self._frozen if p.grad is not None}
        if moved and any(id(p) in moved for group in self.engine.optimizer.param_groups for p in group["params"]):
            raise StructLoRAError(
                f"{len(moved)} LoRA parameters that were frozen when StructLoRA was attached, and now get gradients",
                "the same trainable LoRA parameters throughout, since others would train as plain LoRA",
                "freeze them again; or `detach()` the runtime, unfreeze them and attach again",
            )

    def _refuse_written(self) -> NoReturn:
        raise StructLoRAError(
            "LoRA weights that were written between a training forward and its optimizer step",
            "the weights that the gradients were taken at",
            "write to them after the step, before the next forward",
        )

    def refuse_replaced(self) -> None:
        """Stop where modules of the model hold other LoRA parameters than the optimizer steps.

        Raises:
            StructLoRAError: they do, after `load_state_dict(assign=True)` for instance.
        """
        self._refuse_others((owner._parameters.get(name), p) for owner, name, p in self._owners)

    def _refuse_replaced_by_name(self) -> None:
        """The same by the names in the model, which finds new modules too; slower."""
        named = dict(self.model.named_parameters())
        self._refuse_others((named.get(name), p) for name, p in self._names.items())

    def _refuse_others(self, pairs: Iterable[tuple[nn.Parameter | None, nn.Parameter]]) -> None:
        replaced = 0
        for now, ours in pairs:
            # FSDP2 shows its gathered copies, which are no DTensors, from a forward until its backward.
            is_gathered = isinstance(ours, DTensor) and not isinstance(now, DTensor)
            replaced += now is not None and now is not ours and not is_gathered
        if replaced:
            raise StructLoRAError(
                f"{replaced} LoRA parameters of the model replaced by others since StructLoRA was attached",
                "the parameters that the optimizer steps",
                "load weights into them (`load_state_dict` without `assign=True`), or `detach()`, build the optimizer of the new "
                "ones and attach again",
            )

    def _adopt(self) -> bool:
        """Make latents of evaluation weights that someone else has written since we last did. Whether there were any.

        Raises:
            StructLoRAError: no latents have these evaluation weights.
        """
        if self.weights == LATENT or not self.is_attached or not self.engine.was_written():
            return False
        evaluation = self.evaluation_factors()
        stood = self._effective(self._noise(), everything=True) if self.weights == TRAINING else evaluation
        found = self.engine.read_working()
        wanted = [
            Factors(*(_replaced(*of_side, m.width) for of_side in zip(*parts, strict=True)))
            for m, *parts in zip(self.maps, evaluation, self.engine.rounded(stood), found, strict=True)
        ]
        if all(new is old for parts in zip(wanted, evaluation, strict=True) for new, old in zip(*parts, strict=True)):
            self.engine.stamp()  # written, but to the values that stood: an average swapped in and out, say
            return False
        latents = [
            latents_of(m, target, start)
            for m, target, start in zip(self.maps, wanted, self.engine.read_latents(everything=True), strict=True)
        ]
        unreachable = [m.kind.name for m, latent in zip(self.maps, latents, strict=True) if latent is None]
        if unreachable:
            raise StructLoRAError(
                f"LoRA weights written from outside that the map of '{unreachable[0]}' cannot give",
                "finite weights near those of the run, where a coordinator or 'topk_norm' acts",
                "load the run's own state after them (`load_state`, or `accelerator.register_for_checkpointing(runtime)`); or "
                "`detach()` before you write, and attach again",
            )
        if not self._adopted:
            logger.warning("LoRA weights were written from outside: StructLoRA continues from them.")
        self._adopted = True
        self.engine.write_latents(latents)
        if self.weights == TRAINING:
            self._write(None)
            self.weights = EVALUATION
        self.engine.stamp()
        return True

    def _align(self) -> None:
        aligned = [
            latent
            if not kind.A[0].requires_grad or not width.every(~latent.B.any())
            else Factors(first_everywhere(latent.A, kind), latent.B)
            for kind, latent, width in zip(
                self.kinds, self.engine.read_latents(everything=True), self.engine.widths, strict=True
            )
        ]
        self.engine.write_latents(aligned)
        self.engine.write_working(aligned, ("A",))

    def _are_zeros(self, gradients: list[Factors]) -> bool:
        """Whether no entry of any gradient, on any rank, is other than zero."""
        zeros = [not bool(part.any()) for kind in gradients for part in kind]
        return bool(self._width.every(torch.tensor(all(zeros), device=self.kinds[0].device)))

    def _noise(self) -> list[Tensor | None]:
        """This step's noise, (L, r) per kind; one draw for all kinds, from (seed, step)."""
        if not self.is_noisy:
            return [None] * len(self.maps)
        draw = self.noise.draw(self.step, [m.noise_shape for m in self.maps])
        return [part.to(m.kind.device) for m, part in zip(self.maps, draw, strict=True)]

    @torch.no_grad()
    def _effective(self, noise: Iterable[Tensor | None] | None, everything: bool = False) -> list[Factors]:
        noise = noise or [None] * len(self.maps)
        latents = self.engine.read_latents(everything)
        return [m(latent, part) for m, latent, part in zip(self.maps, latents, noise, strict=True)]

    @torch.no_grad()
    def _passing(self, noise: list[Tensor | None] | None, sides: tuple[str, ...]) -> list[Factors]:
        """`_effective` for the moment, of some sides: the next call, and the next step, write over what it returned."""
        noise = noise or [None] * len(self.maps)
        return [
            m(latent, part, sides, self._kept.get(m.kind.name), rows)
            for m, latent, part, rows in zip(
                self.maps, self.engine.read_latents(), noise, self.engine.rows, strict=True
            )
        ]

    @_timed
    @torch.inference_mode(False)  # a reader may be within it, and what we write must serve training
    def _write(self, noise: list[Tensor | None] | None, sides: tuple[str, ...] = SIDES) -> None:
        if self.step == 0:  # nothing has been written yet, and a part of one's own may change lora_A
            sides = SIDES
        self.engine.write_working(self._passing(noise, sides), sides)
        self.engine.stamp()

    def _build_optimizer(self) -> torch.optim.AdamW | None:
        groups = [
            (self._gate_parameters, self.config.gate_lr),
            (self._coordinator_parameters, self.config.coordinator_lr),
        ]
        groups = [{"params": params, "lr": lr, "base_lr": lr} for params, lr in groups if params]
        # No weight decay: the KL is the logits' prior, and decay would pull every gate towards one half.
        return torch.optim.AdamW(groups, weight_decay=0.0) if groups else None


def _origin(A: Tensor, width: Width) -> Tensor:
    """Where the depths are equal (an aligned start), one copy serves all."""
    return A[:1].clone() if bool(width.every((A == A[:1]).all())) else A.clone()


def _negative(factors: Factors) -> Factors:
    return Factors(-factors.A, -factors.B)


def _replaced(ours: Tensor, stood: Tensor, found: Tensor, width: Width) -> Tensor:
    """Evaluation values (L, ...) with those depths replaced where `found` is not what `stood`, on any rank."""
    same = width.every(((found == stood) | (found.isnan() & stood.isnan())).flatten(1).all(1))
    return ours if bool(same.all()) else torch.where(same[:, None, None], ours, found)
