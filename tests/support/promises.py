"""What each row of `setups.py` must do, as asserts: what a set-up promises its user."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re

import pytest
import torch
from packaging.requirements import Requirement

from structlora_trl.core.expert_storage import to_storage
from tests.support.setups import Setup
from tests.support.tiny import assert_same, evaluation_factors, weights_of

OFF = {"gates": "off", "coordinator": "none"}


def skip_without(needs: tuple[str, ...]) -> None:
    for requirement in map(Requirement, needs):
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            installed = None
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            pytest.skip(f"needs {requirement}")


@contextlib.contextmanager
def mode(model, training: bool):
    """The model in `train()` or `eval()`; each module's own mode afterwards, and the generator as it was."""
    before = {module: module.training for module in model.modules()}
    with torch.random.fork_rng(), torch.no_grad():
        yield model.train(training)
    for module, was_training in before.items():
        module.training = was_training


def logits_of(model, batch: dict) -> torch.Tensor:
    with mode(model, training=False):
        return model(**batch).logits.float()


class Evaluation:
    """Holds a run to its promises at every moment outside the optimizer's step: what stands is the adapter that is saved."""

    def __init__(self, row: Setup, folder):
        self.row, self.folder = row, folder
        self.twin, self.step, self.logits, self.moments = None, None, None, 0

    def __call__(self, run):
        moment, batch = f"moment {self.moments}", self.row.batch(99)
        stands, logits = weights_of(run.model), logits_of(run.model, batch)
        if self.twin is None:
            self.begin(run, stands, logits)
        self.twin.load_state_dict(stands, strict=False)
        difference = (logits - logits_of(self.twin, batch)).abs().max()
        assert difference <= self.row.tolerance, f"{moment}: evaluation is not the saved adapter's"
        # What rests is not what the map makes of the others' latents.
        is_mapped = run.runtime.is_attached and not getattr(self.row.loop, "rests", False)
        computed = evaluation_factors(run.runtime) if is_mapped else []
        for kind, factors in zip(run.runtime.kinds, computed, strict=False):
            for side in kind.sides:
                values = to_storage(getattr(factors, side), side, kind)
                for parameter, value in zip(getattr(kind, side), values, strict=True):
                    expected = value.view_as(parameter).to(parameter.dtype)
                    torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=1e-2, msg=moment)
        if self.step == run.runtime.step:
            assert torch.equal(logits, self.logits), f"{moment}: evaluation changed without a step"
        elif run.runtime.step > 1 and run.runtime.is_attached:  # a warm-up's first rate is 0
            with mode(run.model, training=True), torch.enable_grad():
                first, second = (run.model(**batch).logits for _ in range(2))
            assert not run.runtime.gating or not torch.equal(first, second), f"{moment}: no noise"
        assert_same(weights_of(run.model), stands)
        self.step, self.logits, self.moments = run.runtime.step, logits, self.moments + 1

    def begin(self, run, stands, logits):
        """Attaching changes no output, and no parameter but lora_A where it is aligned."""
        aligned = run.runtime.has_aligned
        left = {n: p for n, p in stands.items() if not (aligned and "lora_A" in n)}
        assert_same(left, {n: run.before[n] for n in left})
        # Trainers draw a fresh adapter of their own, which adds nothing to the base.
        start = self.row.base() if self.row.trainer else self.row.model()
        difference = (logits - logits_of(start, self.row.batch(99))).abs().max()
        assert difference <= self.row.tolerance, "attaching changed the output"
        run.model.save_pretrained(self.folder)
        self.twin = self.row.load(self.folder)


def assert_it_acted(run):
    runtime, row = run.runtime, run.setup
    assert (runtime.step, runtime.skipped_steps) == (row.steps, 0)
    quiet = runtime.quiet
    gates = runtime.gating.gates
    assert len(gates) + sum(quiet.values()) == sum(len(kind.modules) for kind in runtime.kinds)
    assert re.fullmatch(row.quiet, "; ".join(quiet)), f"{runtime}"
    assert all(why in repr(runtime) for why in quiet)
    for module, logits in runtime.gating.state().items():
        start = run.start[f"/gates/{module}"]
        assert logits.isfinite().all() and (logits != start).all(), f"gates of {module} stayed"
    factors = {id(p) for p in runtime.lora_parameters()}
    for name, parameter in run.model.named_parameters():
        if id(parameter) in factors and parameter.requires_grad:
            assert parameter.isfinite().all(), name
            is_closed = runtime.has_selected and not parameter.any()
            assert is_closed or not torch.equal(parameter, run.start[name]), f"{name} stayed"
    for m in runtime.maps:
        coordinated = runtime.config.coordinator != "none" and m.kind.depth_count > 1
        assert len(m.coordinators) == coordinated * len(m.sides)
        for side, coordinator in m.coordinators.items():
            assert coordinator.theta.abs().sum() > 0, f"Θ of {m.kind.name}, {side}"
    if runtime.config.keep is not None:
        assert runtime.has_selected and 0 < sum(int((~m.kept).sum()) for m in runtime.maps)
        for m, factors in zip(runtime.maps, evaluation_factors(runtime), strict=True):
            assert torch.equal(factors.B.any(1), m.kept), f"closed directions of {m.kind.name}"


def assert_same_run(run, other):
    assert_same(run.state(), other.state())
    assert_same_weights(run, other)


def assert_same_weights(run, other):
    assert_same(weights_of(run.model), weights_of(other.model))


def keep_promises(row: Setup, folder) -> None:
    """Attaching changes no output; it acts; what stands is what is saved, a plain PEFT adapter; resume and off are bit for
    bit.
    """
    skip_without(row.needs)
    run = row.loop.run(row, folder, row.method, watch=Evaluation(row, folder / "first"))
    assert_it_acted(run)

    run.model.save_pretrained(folder / "last")
    plain = row.load(folder / "last")
    difference = logits_of(run.model, row.batch(99)) - logits_of(plain, row.batch(99))
    assert difference.abs().max() <= row.tolerance, "the saved adapter gives other logits"
    assert not torch.equal(logits_of(run.model, row.batch(99)), logits_of(row.base(), row.batch(99)))

    assert_same_run(row.loop.run(row, folder, row.method, resume=True), run)

    off, plain = (row.loop.run(row, folder, method, steps=row.half) for method in (OFF, None))
    assert off.losses == plain.losses
    assert_same_weights(off, plain)
