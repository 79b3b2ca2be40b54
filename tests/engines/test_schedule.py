"""The coordinator's rate follows the trainer's schedule: the share of the peak that it declares."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from torch.optim import lr_scheduler
from transformers import SchedulerType
from transformers.optimization import AdafactorSchedule

from tests.support.launching import one_at_a_time, said_in_one_rank
from tests.support.loops import ByHand
from tests.support.promises import skip_without
from tests.support.setups import SETUPS, Setup, adamw, by, loraplus, scheduled, two_groups, with_
from tests.support.tiny import warm_up

THETA_LR = 0.25
METHOD = {"side": "write", "coordinator_lr": THETA_LR}


class FromAThousandth(ByHand):
    shares = (1e-3, 0.3, 0.7, 1.0, 1.0, 1.0)


(RELATIVE,) = (row for row in SETUPS["Optimizers"] if row.name == "Adafactor with relative_step")
ROWS = {
    row.name: row
    for row in [
        *(row for row in SETUPS["Schedules"] if row.name != "LambdaLR on a base rate of 1"),  # as Noam
        # One that reaches its peak at a step.
        Setup("OneCycleLR", schedule=lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=10)),
        Setup(
            "Noam",
            optimizer=partial(adamw, lr=1.0),
            schedule=lambda o: lr_scheduler.LambdaLR(o, lambda i: 1e-4 * min((i + 1) / 3, 9 / (i + 1) ** 2)),
        ),
        Setup("a warm-up from a thousandth", optimizer=partial(adamw, lr=1e-5), loop=FromAThousandth),
        RELATIVE,
        replace(RELATIVE, name="Adafactor with relative_step and schedule", schedule=AdafactorSchedule),
        Setup("lora_A at rate 0", optimizer=partial(two_groups, rate_of_A=0.0)),
        Setup("LoRA+", optimizer=loraplus, schedule=scheduled("linear")),
    ]
}
# Nothing declares how high these go: the rate is `coordinator_lr` itself, or 0.
UNDECLARED = {"Noam"}


def test_every_schedule_of_transformers_has_a_row():
    assert {kind.value for kind in SchedulerType} <= ROWS.keys()


class Rates:
    """Watches a loop: the largest rate of each step's groups, that of Θ, and which share of `coordinator_lr` that is."""

    def __init__(self):
        self.rates, self.own, self.declared = [], [], []

    @property
    def shares(self):
        return [rate / THETA_LR for rate in self.own]

    def __call__(self, run):
        if not self.rates:
            run.optimizer.register_step_pre_hook(self._see)
        else:
            self.own.append(max(group["lr"] for group in run.runtime.optimizer.param_groups))

    def _see(self, optimizer, *_):
        rates = [group["lr"] for group in optimizer.param_groups]
        self.rates.append(
            1.0 if None in rates or "relative_step" in optimizer.defaults else max(map(float, rates))
        )
        declared = [g.get(name) or 0.0 for g in optimizer.param_groups for name in ("initial_lr", "max_lr")]
        self.declared.append(max(self.rates[-1], *map(float, declared)))


@pytest.mark.parametrize("name", ROWS)
def test_rates_of_the_map_are_shares_of_the_peak(name, tmp_path):
    """What a resumed run does is in each set-up's own run (`tests/test_setups.py`)."""
    row = replace(ROWS[name], wrap=with_(warm_up))
    skip_without(row.needs)
    seen = Rates()
    run = row.loop.run(row, tmp_path, METHOD, watch=seen)
    for step, (rate, share) in enumerate(zip(seen.rates, seen.shares, strict=True)):
        if name in UNDECLARED:
            assert share == float(rate > 0)
        else:
            peak = seen.declared[step]
            assert share == pytest.approx(rate / peak if peak else 0.0, rel=1e-6), (
                f"step {step} of {seen.rates}"
            )
    end = run.runtime.state_dict()
    moved = [(end[n] - run.start[n]).abs().max() for n in end if n.endswith("theta")]
    assert moved and min(moved) > 0.05, "never trained"


DEFAULTS = {  # set-up -> the coordinator's rate as a multiple of that of LoRA
    "AdamW": (Setup("", optimizer=partial(adamw, lr=2e-4), schedule=scheduled("linear", warmup=2)), 1),
    "a warm-up that declares no peak": (ROWS["a warm-up from a thousandth"], 1),
    "LoRA+": (ROWS["LoRA+"], 0.01 / 0.016),
    "SGD": (Setup("", optimizer=by("SGD", lr=0.5), schedule=scheduled("cosine", warmup=0)), 0.01 / 0.5),
    "relative steps": (RELATIVE, 0.01),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_by_default_the_rate_is_that_of_lora_and_at_most_a_hundredth(name, tmp_path):
    row, multiple = DEFAULTS[name]
    skip_without(row.needs)
    seen = Rates()
    row.loop.run(replace(row, wrap=with_(warm_up)), tmp_path, {"side": "write"}, watch=seen)
    assert max(seen.own) > 0
    assert seen.own == pytest.approx([multiple * rate for rate in seen.rates])


@pytest.mark.slow
@one_at_a_time
def test_deepspeed_reads_the_groups_of_the_lora_parameters():
    """A first group of other parameters has a schedule of its own; under DeepSpeed's WarmupLR its configured rate is the peak."""
    pytest.importorskip("deepspeed")
    expected = {"groups": [1.0, 0.5, 0.25], "WarmupLR": [0.0, 0.0, 0.5]}  # DeepSpeed repeats the first rate
    for engine, found in said_in_one_rank("groups").items():
        for name, shares in expected.items():
            assert found[name] == pytest.approx(shares, abs=1e-6), (engine, name)
