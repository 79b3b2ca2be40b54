"""One optimizer step: the pullback, the optimizer's step on latents, the small optimizer of gates and Θ.

What stands in the model before and after it, and who may change that, is told by `standing_weights.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import foreign_writes
from .config import StructLoRAConfig
from .core.diagnostics import structure_metrics
from .core.heads import head_numbers
from .core.kinds import SIDES, Factors, Kind
from .core.mapping import DEFAULT_PARTS, KindMap, Noise, Parts, mapped_sides
from .core.regularizers import cosines, neighbour_products
from .core.selection import select
from .engines import Engine
from .engines.schedule import Rate, ScheduleShare
from .engines.slices import Slices
from .errors import StructLoRAError
from .map_context import in_map_context
from .rank_check import world_size
from .read_hooks import ReadHooks
from .standing_weights import EVALUATION, LATENT, TRAINING, StandingWeights
from .state import State

logger = logging.getLogger(__name__)

DEFAULT_SEED = 42


class _Pulled(NamedTuple):
    """What the pullback of one kind gave: gradients of latent factors, of the map's parameters (this rank's
    share, where factors are slices), the gradients of node features by side, where they are wanted, and the
    relevance of directions, while it is gathered.
    """

    factors: Factors
    own: dict[str, Tensor]
    features: dict[str, Tensor]
    relevance: list[Tensor]


class _Summed(NamedTuple):
    """A step's sums over ranks: whether gradients are bad and whether weights were written on some rank;
    gradients of the maps' parameters; products of neighbouring depths' gradients (see `neighbour_products`),
    where a metric is to be made of them; and the relevance of directions, while it is gathered.
    """

    is_bad: bool
    is_written: bool
    own: list[dict[str, Tensor]]
    products: list[Tensor]
    relevance: list[Tensor]


class Runtime(StandingWeights):
    """StructLoRA on one adapter and one optimizer.

    Args:
        model (`nn.Module`): the model whose parameters the kinds hold; None once detached.
        kinds (`list[Kind]`): what is trained.
        config (`StructLoRAConfig`): how.
        engine (`Engine`): who owns the parameters.
        seed (`int`, *optional*, defaults to 42): of the gate noise, where the config names none.
        align (`bool`, *optional*, defaults to False): give every node of a fresh kind (B = 0) the lora_A of
            the first.
        absorbs_base (`bool`, *optional*, defaults to False): the adapter's start holds part of the base
            weights (PiSSA).
        parts (`Parts`, *optional*): what to build the maps and the noise of, where that is not the package's
            own.
        noise_off (`str`, *optional*): why `noise='auto'` is off in this run; where omitted, it is on.
        frozen (`list[nn.Parameter]`, *optional*): LoRA factors of the adapter that no map has, and must stay
            frozen.
        readers (`tuple[nn.Module]`, *optional*): modules whose methods (`generate`, `merge_and_unload`) read
            the weights.
        select_step (`int`, *optional*): optimizer steps after which directions are selected.

    Attributes:
        weights (`str`): which weights stand in the model, see `StandingWeights`.
        step (`int`): optimizer steps that counted.
        skipped_steps (`int`): optimizer steps skipped for NaN or Inf in the gradients.
        schedule (`ScheduleShare`): where the learning rates' schedule stands.
        has_aligned (`bool`): whether attaching changed lora_A, of a fresh adapter.

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
        noise_off: str | None = None,
        frozen: list[nn.Parameter] | None = None,
        readers: tuple[nn.Module, ...] = (),
        select_step: int | None = None,
    ):
        seed = seed if config.seed is None else config.seed
        why_quiet = {"on": None, "off": "as configured", "auto": noise_off}[config.noise]
        super().__init__(kinds, engine, parts.noise(seed), why_quiet, parts)
        self.model, self.config, self.seed = model, config, seed
        self.skipped_steps = self.hook_calls = 0
        self.schedule = ScheduleShare()
        self._select_step, self._absorbs_base, self._frozen = select_step, absorbs_base, frozen or []
        self._rate: Rate | None = None  # of the step under way, where it counts
        self._cosine: Tensor | None = None  # of gradients, in the first step since the last `metrics()`
        self._relevance: list[Tensor] = []  # of the directions in the step under way, while it is gathered
        self._metric_steps = 0
        self.on_detach: list[Callable[[], None]] = []  # called when `detach()` is done
        with ExitStack() as on_error:
            engine.install(
                self._before_step, self._after_step, [mapped_sides(k, config, parts) for k in kinds]
            )
            on_error.callback(engine.remove)
            self._build(align)
            self.owners = foreign_writes.owners_of(model, self.lora_parameters())
            for parameter in (p for p in self.lora_parameters() if p.requires_grad):
                handle = parameter.register_post_accumulate_grad_hook(self._check_standing_weights)
                on_error.callback(handle.remove)
            self._in_graphs = foreign_writes.in_graphs(self.lora_parameters())
            self._hooks = ReadHooks(self, model, readers)
            on_error.callback(self._hooks.remove)
            self._remove_hooks = on_error.pop_all().close

    @in_map_context
    @torch.no_grad()
    def _build(self, align: bool) -> None:
        """Build maps and optimizer from the factors that stand, and align those factors where asked."""
        latents = self.engine.read_latents(everything=True)
        slices = self.engine.slices
        aligned = self._to_align(latents) if align else [False] * len(self.kinds)
        starts = [  # aligned: the first lora_A at all depths, and of all experts
            Factors(f.A[:1].expand_as(f.A).clone(), f.B) if same else f
            for f, same in zip(latents, aligned, strict=True)
        ]
        self.maps = [self._map(*of_kind) for of_kind in zip(self.kinds, starts, aligned, slices, strict=True)]
        self._gate_count = sum(m.gate_count for m in self.maps)
        self._optimizer = _small_optimizer(self.maps, self.config, self._gate_count)
        self.has_aligned = any(aligned)
        if self.has_aligned:
            self.engine.write_latents(starts)
            self.engine.write_working(starts, ("A",))
        self.engine.stamp()
        if self._select_step == 0:
            self._select()
            self._write(None)

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
        side = kind.heads.side if kind.heads else None
        head_of = slices.part(head_numbers(kind), side).flatten() if side else None
        A = start.A[:1] if aligned else start.A
        B = start.B.clone() if self._absorbs_base or kind.is_vera else None
        m = KindMap(kind, self.config, A.clone(), B, self._parts, head_of)
        for part in m.modules():
            if hasattr(part, "sum_over_width"):
                part.sum_over_width = slices.sum_with_gradient
        return m

    def __repr__(self) -> str:
        """What acts, in one line: engine (with its stage), processes, kinds and depths, gates, noise, edges."""
        depths = ", ".join(f"{kind.name} x{kind.depth_count}" for kind in self.kinds)
        config = self.config
        gates = sum(logits.numel() for m in self.maps for logits in m.gate_logits)
        edges = sum(int(m.graph.edges.sum()) // 2 for m in self.maps if m.coordinators)
        graph = "" if config.coordinator == "none" else f" ({edges} edges, {config.edges})"
        noise = f", noise off ({self.noise_off})" if self.noise_off else ", noise on"
        noise = noise if any(gate.is_stochastic for m in self.maps for gate in m.filters) else ""
        alone = [
            m.kind.name
            for m in self.maps
            if not m.sides and m.kind.depth_count > 1 and config.compares_depths
        ]
        kept = "" if self._select_step is None else f", keep={config.keep} from step {self._select_step} on"
        left_out = f", not coordinated (role unknown, see `roles`): {', '.join(alone)}" if alone else ""
        return (
            f"StructLoRA on {self.engine.name}, {world_size()} process{'es' if world_size() > 1 else ''}: "
            f"{len(self.kinds)} kinds ({depths}), filter {config.filter} ({gates} gates){kept}{noise}, "
            f"coordinator {config.coordinator}{graph}{left_out}, seed {self.seed}"
        )

    @in_map_context
    def _before_step(self) -> bool:
        """Carry the gradients back through the map. False where the optimizer must not step."""
        self.hook_calls += 1
        self._rate = None
        foreign_writes.refuse_replaced(self.owners)
        gradients = self.engine.read_gradients()
        if gradients is None or (not self._trained_forward and self._are_zeros(gradients)):
            # No backward has run: there is nothing to step, with or without us. Zeros are what
            # `zero_grad(set_to_none=False)` leaves, and what torch's distributed checkpoints have an
            # optimizer step with.
            foreign_writes.refuse_replaced_by_name(self.model, self.owners)
            if self.weights != LATENT and self.were_changed():
                foreign_writes.refuse_changed()
            self.weights, self._trained_forward, self._mixed_gradients = LATENT, False, False
            return True
        self._refuse_step()
        written = self.engine.written()
        scale = self.engine.gradient_scale()
        pulled = [
            self._pull(m, *parts, scale)
            for m, *parts in zip(self.maps, self.engine.read_latents(), gradients, self._noise(), strict=True)
        ]
        summed = self._summed(pulled, written)
        if summed.is_written and self.were_changed():
            foreign_writes.refuse_write_before_step(type(self.engine.optimizer).__name__)
        self.weights, self._trained_forward = LATENT, False
        if summed.is_bad:
            self.skipped_steps += 1
            logger.warning(
                "Gradients hold NaN or Inf: step skipped, nothing changed (%d skipped so far).",
                self.skipped_steps,
            )
            return False
        if summed.products:
            self._cosine = torch.stack(
                [cosines(product).mean().to(self.device) for product in summed.products]
            ).mean()
        self._relevance = summed.relevance
        for m, part, task in zip(self.maps, pulled, summed.own, strict=True):
            for name, value in m.objective_gradients(task, self.config.kl_weight / self._gate_count).items():
                m.get_parameter(name).grad = value
            if m.coordinators and m.graph.follows_gradients:
                m.graph.observe(part.features)
        self.engine.write_gradients([part.factors for part in pulled], [m.joins_depths for m in self.maps])
        self._rate = self.engine.learning_rate()
        return True

    def _refuse_step(self) -> None:
        """Stop where the gradients are not of what the maps made, or would move what no map has."""
        if not self._trained_forward:
            raise StructLoRAError(
                "an optimizer step on gradients taken at the evaluation weights",
                "a forward at the training weights before each step, that is, one under `model.train()`",
                "call `model.train()` before the forward (`runtime.train()` where it calls no module that contains adapted "
                "layers); to train without dropout, set its probability to 0, or put the dropout modules alone into `eval()`",
            )
        if self._mixed_gradients:
            raise StructLoRAError(
                "gradients of a backward that ran at other LoRA weights than its forward",
                "the training weights of the step from its first training forward until `optimizer.step()`",
                "call `runtime.eval()` or load weights after the step, not between a training forward and its backward",
            )
        unfrozen = {id(p) for p in self._frozen if p.grad is not None}
        if unfrozen and any(
            id(p) in unfrozen for group in self.engine.optimizer.param_groups for p in group["params"]
        ):
            raise StructLoRAError(
                f"{len(unfrozen)} LoRA parameters that were frozen when StructLoRA was attached, and now get gradients",
                "the same trainable LoRA parameters throughout, since others would train as plain LoRA",
                "freeze them again; or `detach()` the runtime, unfreeze them and attach again",
            )

    def _are_zeros(self, gradients: list[Factors]) -> bool:
        """Whether no entry of any gradient, on any rank, is other than zero."""
        zeros = [not bool(part.any()) for kind in gradients for part in kind]
        return bool(self._slices.every(torch.tensor(all(zeros), dtype=torch.bool, device=self.device)))

    def _pull(
        self, m: KindMap, latent: Factors, gradient: Factors, noise: Noise, scale: float | Tensor
    ) -> _Pulled:
        """One kind's gradients, carried back through its map. `scale` is the loss scale of mixed precision."""
        scale = scale.to(m.kind.device) if isinstance(scale, Tensor) else scale
        # The maps' own optimizer descends: where the trainer's ascends, they see the negative of its
        # objective.
        sign = -1 if self.engine.maximizes() else 1
        factors, own = m.pullback(latent, Factors(*(sign * part for part in gradient)), noise)
        relevance = []
        if self._gathers_relevance():
            # Effective lora_B is linear in the gate that multiplies latent lora_B, so that the gradient with
            # respect to its logarithm is this product (`core/selection.py`). Those of slices add up.
            relevance.append(torch.linalg.vecdot(factors.B, latent.B, dim=-2) / scale)
        penalty = m.regularizer_gradient(latent, self._slices.sum)
        if penalty is not None:
            factors = Factors(*(f + scale * p for f, p in zip(factors, penalty, strict=True)))
        factors = Factors(*(sign * part for part in factors))
        wanted = (self._cosine is None and self.step > 0) or (m.coordinators and m.graph.follows_gradients)
        is_there = not self.is_sharded or set(m.sides) <= set(mapped_sides(m.kind, self.config, self._parts))
        sides = m.sides if wanted and is_there and m.kind.depth_count > 1 else ()
        # Closed directions join no depths.
        passing = gradient if m.selection is None else m.selection(gradient)
        return _Pulled(
            factors,
            {name: value / scale for name, value in own.items()},
            # Unscaled and clipped, whichever engine.
            {side: getattr(passing, side) / scale for side in sides},
            relevance,
        )

    def _gathers_relevance(self) -> bool:
        """Whether the step under way is one whose relevance counts for the selection to come."""
        return (
            self._select_step is not None
            and self.step >= self._select_step // 2
            and not self.maps[0].selection.is_made
        )

    def _summed(self, pulled: list[_Pulled], written: Tensor) -> _Summed:
        """Sums over ranks, in one collective, and the one place where a step waits for the device."""
        wants_cosine = self._cosine is None and self.step > 0
        products = [
            neighbour_products(
                torch.cat([m.graph.by_expert(g).flatten(2) for g in part.features.values()], dim=-1)
            )
            for m, part in zip(self.maps, pulled, strict=True)
            if wants_cosine and part.features
        ]
        own = [value for part in pulled for value in part.own.values()]
        bad = self.engine.bad_gradients()
        flags = torch.stack([bad, written.to(bad.device, bad.dtype)])
        gathered = [d for part in pulled for d in part.relevance]
        flags, *sums = self._slices.sums([flags, *gathered, *own, *products])
        is_bad, is_written = flags.bool().tolist()
        gathered, sums = sums[: len(gathered)], iter(sums[len(gathered) :])
        own = [{name: next(sums) for name in part.own} for part in pulled]
        return _Summed(is_bad, is_written, own, list(sums), gathered)

    @in_map_context
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
            if self._relevance:
                for m, d in zip(self.maps, self._relevance, strict=True):
                    m.selection.observe(d)
            self.step += 1
            self._metric_steps += 1
            if self._select_step is not None and self.step >= self._select_step:
                self._select()
            if self.step % self.config.semantic_every == 0:
                graphs = [m.graph for m in self.maps if m.coordinators and m.graph.follows_gradients]
                products = self._slices.sums([graph.gradient_products() for graph in graphs])
                for graph, of_graph in zip(graphs, products, strict=True):
                    graph.rebuild(of_graph)
            self._rate = None
        self._write(None)
        self.weights, self._mixed_gradients = EVALUATION, False

    def _select(self) -> None:
        """Make the selection, once."""
        selections = [m.selection for m in self.maps]
        if selections[0].is_made or not select(selections, self.config, self.seed):
            return
        count, total = (
            sum(int(s.kept.sum()) for s in selections),
            sum(s.kept.numel() for s in selections),
        )
        empty = sum(int((~s.kept.any(-1)).sum()) for s in selections)
        logger.info(
            "StructLoRA keeps %d of %d directions from step %d on (%d modules keep none).",
            count,
            total,
            self.step,
            empty,
        )

    @property
    def is_sharded(self) -> bool:
        """Whether ranks have slices: call `state_dict()`, `save_state` and `metrics()` on every rank then."""
        return self._slices.is_shared

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
        metrics = structure_metrics(self.maps, self._effective(None), self._slices.sums)
        if self._cosine is not None:
            metrics["gradient_cosine"] = self._cosine.item()
        metrics["peak_lr"] = self.schedule.peak
        metrics["skipped_steps"] = self.skipped_steps
        metrics["map_ms"] = self.stopwatch.take() / max(self._metric_steps, 1)
        self._metric_steps, self._cosine = 0, None
        return {f"structlora/{name}": value for name, value in metrics.items()}

    @in_map_context
    def state_dict(self) -> dict[str, Tensor]:
        """Latents, logits, Θ, their optimizer's state, graphs, options and the noise's step, as one flat dict.

        Under FSDP2 and ZeRO, call it on every rank: the ranks' slices are gathered, on the CPU.
        """
        counts = {"seed": self.seed, "step": self.step, "skipped_steps": self.skipped_steps}
        latents = self.engine.read_latents(everything=True)
        kinds = zip(self.maps, latents, self.engine.slices, strict=True)
        return State.of(self.config, counts, self.schedule, kinds, self._optimizer).flatten()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict()`: afterwards the model holds that state's evaluation weights.

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
        state.refuse_other_run(self.config, kinds)
        changes = state.changes(self.config, self.seed)
        if changes:
            logger.warning(
                "StructLoRA continues with other options than the state's: %s.", ", ".join(changes)
            )
        self.engine.write_latents([state.load_into(m, slices, self._optimizer) for m, _, slices in kinds])
        self.step, self.skipped_steps, self.schedule = state.step, state.skipped_steps, state.schedule
        self._write(None)
        self.weights, self._trained_forward = EVALUATION, False

    @in_map_context
    def reload(self) -> None:
        """Start again from the LoRA weights that stand in the model, which other code has written.

        They become the latent factors. Gates, coordinator, graph and their optimizer start anew, as at
        `attach`; the step's number goes on, and with it the noise. Directions that selection has closed stay
        closed. To continue a run of StructLoRA, use `load_state` instead.

        Raises:
            StructLoRAError: other than evaluation weights stand (between a training forward and the end of its
                optimizer step, or after a step that an exception broke off); or the runtime is detached.
        """
        self._refuse_detached()
        if self.weights != EVALUATION:
            raise StructLoRAError(
                f"`reload()` while {self.weights} weights stand, between a training forward and the end of its optimizer step",
                "evaluation weights to start from",
                "call `runtime.eval()`, write the weights and then call `reload()`; or drop what was written to training weights, "
                "by `runtime.load_state_dict(runtime.state_dict())`",
            )
        self.engine.write_latents(self.engine.read_working())
        selections = [m.selection for m in self.maps]
        self._build(align=False)
        if self._select_step is not None:
            for m, selection in zip(self.maps, selections, strict=True):
                m.selection.load_state_dict(selection.state_dict())
            self._write(None)
        self.schedule = ScheduleShare()
        self.weights, self._trained_forward = EVALUATION, False

    @in_map_context
    def detach(self) -> None:
        """Leave the model with evaluation weights, a plain LoRA adapter, and let go of model and optimizer.

        A detached runtime keeps its state (`state_dict()`, `metrics()`). Once detached, it does nothing.
        """
        if not self.is_attached:
            return
        if self.weights == TRAINING and self.were_changed():
            logger.warning(
                "What other code wrote to training weights is dropped: the model keeps evaluation weights."
            )
            self.weights = LATENT
        self.eval()
        if self._select_step is not None and not self.maps[0].selection.is_made:
            logger.warning(
                "keep=%r closed no direction: the weights are of step %d, and directions are selected at step %d.",
                self.config.keep,
                self.step,
                self._select_step,
            )
        self.is_attached = False
        self._remove_hooks()
        # Whoever keeps the runtime for its state or figures does not keep the model.
        self.model, self.owners = None, []
        for call in self.on_detach:
            call()


def _small_optimizer(
    maps: list[KindMap], config: StructLoRAConfig, gate_count: int
) -> torch.optim.AdamW | None:
    """The AdamW of gate logits and Θ, equal on every rank; None where there are none.

    The KL is a mean over gates: its gradient with respect to each is smaller the more there are, and so is
    epsilon then.
    """
    logits = [parameter for m in maps for parameter in m.gate_logits]
    weights = [parameter for m in maps for parameter in m.coordinators.parameters()]
    groups = [(logits, config.gate_lr, 1e-8 / gate_count), (weights, config.coordinator_lr, 1e-8)]
    groups = [{"params": params, "lr": lr, "base_lr": lr, "eps": eps} for params, lr, eps in groups if params]
    # No weight decay: the KL is the logits' prior, and decay would pull every gate towards one half.
    return torch.optim.AdamW(groups, weight_decay=0.0) if groups else None
