"""What each row of `setups.py` must do, as asserts: what a set-up promises its user."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from packaging.requirements import Requirement

from structlora_trl.core.expert_storage import to_storage
from tests.support.loops import HALF, STEPS, trainable
from tests.support.setups import Setup
from tests.support.tiny import assert_same, evaluation_factors

OFF = {"filter": "none", "coordinator": "none"}
LEAST_MOVE = 1e-3  # of the gate logit that moved most
ADAMW_OVERSHOOT = 1.2  # AdamW's steps can be a little longer than its rate


def skip_without(needs: tuple[str, ...]) -> None:
    for requirement in map(Requirement, needs):
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            installed = None
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            pytest.skip(f"needs {requirement}")


@torch.no_grad()
def logits_of(model, batch: dict) -> torch.Tensor:
    was_training = model.training
    model.eval()
    logits = model(**batch).logits.float()
    model.train(was_training)
    return logits


class Evaluation:
    """Compares what a model computes under `eval()` with its saved adapter in plain PEFT, at any moment."""

    def __init__(self, row: Setup, folder):
        self.row, self.folder = row, folder
        self.twin, self.step, self.logits, self.moments = None, None, None, 0

    def __call__(self, run):
        names = {id(p): name for name, p in trainable(run.model).items()}
        shown = {name: run.model.state_dict()[name].clone() for name in names.values()}
        logits = logits_of(run.model, self.row.batch(99))
        if self.twin is None:
            # Trainers draw a fresh adapter of their own, which adds nothing to the base.
            start = self.row.base() if self.row.trainer else self.row.model()
            difference = (logits - logits_of(start, self.row.batch(99))).abs().max()
            assert difference <= self.row.tolerance, "attaching changed the output"
            run.model.save_pretrained(self.folder)
            self.twin = self.row.load(self.folder)
        self.twin.load_state_dict(shown, strict=False)
        plain = logits_of(self.twin, self.row.batch(99))
        difference = (logits - plain).abs().max()
        assert difference <= self.row.tolerance, (
            f"moment {self.moments}: evaluation is not the saved adapter's"
        )
        for kind, factors in zip(run.runtime.kinds, evaluation_factors(run.runtime), strict=True):
            for side in kind.sides:
                own, values = getattr(kind, side), to_storage(getattr(factors, side), side, kind)
                for name, value in (
                    (names[id(p)], v.to(p.dtype)) for p, v in zip(own, values, strict=True) if p.requires_grad
                ):
                    assert torch.equal(shown[name].reshape(value.shape), value), (
                        f"moment {self.moments}: {name}"
                    )
        if self.step == run.runtime.step:
            assert torch.equal(logits, self.logits), (
                f"moment {self.moments}: evaluation changed without a step"
            )
        self.step, self.logits, self.moments = run.runtime.step, logits, self.moments + 1


def assert_it_acted(run):
    runtime, config = run.runtime, run.runtime.config
    assert (runtime.step, runtime.skipped_steps) == (STEPS, 0)
    state = runtime.state_dict()
    for m in runtime.maps:
        before, after = (
            {n: s[f"{m.kind.name}/{n}"] for n in ("latent_A", "latent_B")} for s in (run.start, state)
        )
        for name, parameters in (("latent_A", m.kind.A), ("latent_B", m.kind.B)):
            if any(p.requires_grad for p in parameters):
                moved = (after[name] - before[name]).flatten(1).abs().amax(1)
                assert (moved > 0).all(), f"{name} of {m.kind.name} stayed"
            assert after[name].isfinite().all()
        if m.filter.logits is not None:
            moved = (m.filter.logits - torch.tensor(config.gate_init).logit()).abs().amax()
            assert LEAST_MOVE < moved < ADAMW_OVERSHOOT * STEPS * config.gate_lr, (
                f"gates of {m.kind.name}: {moved}"
            )
        coordinated = config.coordinator != "none" and m.kind.depth_count > 1
        assert len(m.coordinators) == coordinated * len(m.sides)
        for side, coordinator in m.coordinators.items():
            assert coordinator.theta.abs().sum() > 0, f"Θ of {m.kind.name}, {side}"


def assert_same_run(run, other):
    assert_same(run.runtime.state_dict(), other.runtime.state_dict())
    assert_same_weights(run, other)


def assert_same_weights(run, other):
    assert_same(trainable(run.model), trainable(other.model))


def keep_promises(row: Setup, folder) -> None:
    """Attaching changes no output; it acts; evaluation weights are the saved ones, a plain PEFT adapter; resume and off are
    bit for bit.
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

    off, plain = (row.loop.run(row, folder, method, steps=HALF) for method in (OFF, None))
    assert off.losses == plain.losses
    assert_same_weights(off, plain)
