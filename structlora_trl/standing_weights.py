"""Which weights stand in the model, and who may change them.

Between optimizer steps the model holds evaluation weights: deterministic, what is saved and measured. A
training forward puts the noisy training weights of the coming step in place, and they stand until the
optimizer steps. Code that reads the model in between sees evaluation weights (`read_hooks.py`). Weights that
other code writes must be back at the next training forward, or that forward stops the run (`Runtime.reload`
starts from them).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from . import foreign_writes
from .core.gates import LogisticNoise
from .core.kinds import SIDES, Factors, Kind
from .core.mapping import KindMap, Noise, Parts
from .engines import Engine
from .engines.base import is_same
from .engines.slices import Slices
from .errors import StructLoRAError
from .map_context import in_map_context
from .rank_check import is_distributed
from .stopwatch import Stopwatch

# Latent weights stand during an optimizer step, and after one that an exception broke off.
EVALUATION, TRAINING, LATENT = "evaluation", "training", "latent"


class StandingWeights:
    """Puts training and evaluation weights in place; the base of `Runtime`, which builds the maps.

    Args:
        noise (`LogisticNoise`): what draws the gates' noise.

    Attributes:
        weights (`str`): which weights stand in the model: 'evaluation', 'training' or, during an optimizer
            step, 'latent'.
        is_attached (`bool`): whether the model and its optimizer are still in use.
        maps (`list[KindMap]`): one per kind.

    All else is told by `Runtime`.
    """

    def __init__(
        self, kinds: list[Kind], engine: Engine, noise: LogisticNoise, noise_off: str | None, parts: Parts
    ):
        self.kinds, self.engine, self.noise, self.noise_off = kinds, engine, noise, noise_off
        self.device, self.stopwatch = kinds[0].device, Stopwatch(kinds[0].device)
        self.weights, self.is_attached, self.step = EVALUATION, True, 0
        self.maps: list[KindMap] = []
        self._parts = parts
        self._trained_forward = False  # whether training weights have stood since the last step
        self._mixed_gradients = False  # whether a gradient since then arrived while others stood
        self._in_graphs: set[int] | None = None  # parameters in graphs at attach, until a training forward

    @property
    def is_noisy(self) -> bool:
        """Whether training weights differ from evaluation weights."""
        return self.noise_off is None and any(gate.is_stochastic for m in self.maps for gate in m.filters)

    @in_map_context
    def train(self) -> None:
        """Put the training weights of the coming step in place (the same ones until the step is done).

        Raises:
            StructLoRAError: other code has written to the LoRA weights since StructLoRA did; or, the first time, a
                graph that is still alive reads them; or the runtime is detached.
        """
        self._refuse_detached()
        if self.weights == TRAINING:
            if self.engine.was_touched() and self.were_changed():
                foreign_writes.refuse_write_before_step(type(self.engine.optimizer).__name__)
        elif self.weights == EVALUATION:
            if self.were_changed():
                foreign_writes.refuse_changed()
            if self.is_noisy:
                self._refuse_early_graphs()
                self._write(self._noise(), self._noisy_sides())
        else:
            self._write(self._noise())
        if self._mixed_gradients and all(p.grad is None for p in self.lora_parameters()):
            self._mixed_gradients = False  # they were zeroed since
        self.weights, self._trained_forward = TRAINING, True

    @in_map_context
    def eval(self) -> None:
        """Put the evaluation weights in place; after a step that broke off, those of before that step.

        Raises:
            StructLoRAError: other code has written to training weights.
        """
        if self.weights == TRAINING:
            if self.were_changed():
                foreign_writes.refuse_write_before_step(type(self.engine.optimizer).__name__)
            if self.is_noisy:
                self._write(None, self._noisy_sides())
        elif self.weights == LATENT:
            self._write(None)
        self.weights = EVALUATION

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Evaluation weights for a reader. Training weights that a backward may need stand again after."""
        if self.weights != TRAINING or not self.is_noisy:
            if self.weights == LATENT:
                self.eval()
            yield
            return
        versions = self.engine.keep_versions()
        self.eval()
        try:
            with ExitStack() as stack:
                if torch.is_grad_enabled():
                    # A backward of what is computed here would meet the step's training weights.
                    hooks = torch.autograd.graph.saved_tensors_hooks(
                        lambda x: x, self._refuse_backward_of_reader
                    )
                    stack.enter_context(hooks)
                yield
        finally:
            if self.weights == EVALUATION and self.is_attached and not self.were_changed():
                self.train()
                versions.close()
                self.engine.stamp()

    def _refuse_backward_of_reader(self, saved: Tensor) -> Tensor:
        if self.weights != EVALUATION:
            raise StructLoRAError(
                "a backward through a forward under `eval()`, which saw evaluation weights, after a training forward of the "
                "same step",
                "a loss of forwards under `model.train()` alone",
                "call `model.train()` before each forward that the loss is made of; to leave dropout out of one, put the dropout "
                "modules alone into `eval()`",
            )
        return saved

    @property
    def shows_evaluation_weights(self) -> bool:
        """Whether what stands in the model is what a reader should see."""
        return self.weights == EVALUATION or (self.weights == TRAINING and not self.is_noisy)

    def lora_parameters(self) -> list[nn.Parameter]:
        """The model's LoRA parameters that the maps have; the maps' own are `parameters()` of each in `maps`."""
        return [p for kind in self.kinds for p in kind.parameters]

    @in_map_context
    def evaluation_values(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Each LoRA parameter with its evaluation value, as the model would hold it."""
        return list(self.engine.stored(self._effective(None)))

    def _refuse_detached(self) -> None:
        if not self.is_attached:
            raise StructLoRAError(
                "a detached runtime that is to write weights",
                "one that is attached; a detached one keeps its state and its metrics, and its model is plain LoRA",
                "call `attach` again, with an optimizer of the model's parameters",
            )

    def _check_standing_weights(self, parameter: nn.Parameter) -> None:
        """Called when a backward has left a gradient: the weights that stand must be those of the forward."""
        if self._trained_forward and self.weights != TRAINING and self.is_noisy:
            self._mixed_gradients = True

    def _refuse_early_graphs(self) -> None:
        """Once: stop where a graph made since attach reads weights that are about to be replaced.

        Whoever builds a penalty before the forward does so in the first step, too. Not where torch.distributed
        is on: DDP keeps the ends of graphs alive.
        """
        if self._in_graphs is not None and not is_distributed():
            early = foreign_writes.in_graphs(self.lora_parameters()) - self._in_graphs
            if early:
                foreign_writes.refuse_early_graph(len(early))
        self._in_graphs = None

    @in_map_context
    def were_changed(self) -> bool:
        """Whether other weights stand than StructLoRA's. Equal values (of a swapped average) are fine."""
        if self.weights == LATENT or not self.is_attached:
            return False
        # Of slices, one rank's own may be all that was written; what follows is a collective.
        if bool(self._slices.every(self.engine.written() == 0)):
            return False
        expected = self._effective(self._noise() if self.weights == TRAINING else None)
        same = [
            is_same(value.to(parameters[0].dtype).float(), stands)
            for kind, factors, standing in zip(self.kinds, expected, self.engine.read_working(), strict=True)
            for parameters, value, stands in zip((kind.A, kind.B), factors, standing, strict=True)
        ]
        if not bool(self._slices.every(torch.stack(same).all())):
            return True
        self.engine.stamp()
        return False

    @property
    def _slices(self) -> Slices:
        return self.engine.slices[0]  # the ranks are the same for every kind

    def _noise(self) -> list[Noise | None]:
        """This step's noise of each kind; one draw for all, from (seed, step)."""
        if not self.is_noisy:
            return [None] * len(self.maps)
        drawn = iter(self.noise.draw(self.step, [gate.shape for m in self.maps for gate in m.filters]))
        return [[next(drawn).to(m.kind.device) for _ in m.filters] for m in self.maps]

    def _noisy_sides(self) -> tuple[str, ...]:
        """The factors that noise reaches; both in the first step, in which nothing has been written yet, and
        where a filter of the user's own may act on either.
        """
        on_A = self.step == 0 or self._parts.filter is not None
        on_A = on_A or any(m.kind.heads and m.kind.heads.side == "A" for m in self.maps)
        return SIDES if on_A else ("B",)

    @torch.no_grad()
    def _effective(self, noise: list[Noise | None] | None, everything: bool = True) -> list[Factors]:
        noise = noise or [None] * len(self.maps)
        latents = self.engine.read_latents(everything)
        return [m(latent, part) for m, latent, part in zip(self.maps, latents, noise, strict=True)]

    @torch.no_grad()
    def _write(self, noise: list[Noise | None] | None, sides: tuple[str, ...] = SIDES) -> None:
        self.engine.write_working(self._effective(noise, everything=False), sides)
        self.engine.stamp()
