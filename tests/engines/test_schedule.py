"""`gate_lr` and `coordinator_lr` follow the trainer's schedule: the share of its peak, under every scheduler and after a resume."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedulers
from transformers import Adafactor, SchedulerType, get_scheduler
from transformers.optimization import AdafactorSchedule

from structlora_trl import attach
from structlora_trl.engines.schedule import LONGEST_WARM_UP, Rate, ScheduleShare
from structlora_trl.state import load_state, save_state
from tests.support.launching import one_at_a_time, run
from tests.support.tiny import adamw, lora_parameters, loss_of, peft_model

PEAK, STEPS, HALF = 1e-3, 8, 4
GATE_LR, THETA_LR = 0.5, 0.25


def by_hand(rate_of_step):
    """A schedule in the loop's own code: it sets the groups' rates before each step."""

    def schedule(optimizer, step):
        for group in optimizer.param_groups:
            group["lr"] = rate_of_step(step)

    return schedule


def transformers_scheduler(name):
    needs = {"cosine_with_min_lr": {"min_lr": 1e-5}, "cosine_warmup_with_min_lr": {"min_lr": 1e-5}}
    needs |= {
        "warmup_stable_decay": {"num_decay_steps": 3},
        "reduce_lr_on_plateau": {"patience": 0, "factor": 0.3},
    }
    needs |= {"greedy": {"patience": 0, "factor": 0.5, "min_lr": 1e-5, "max_lr": PEAK}}
    return lambda optimizer: get_scheduler(name, optimizer, 3, STEPS, needs.get(name))


def scheduler(name, **options):
    return lambda optimizer: getattr(torch_schedulers, name)(optimizer, **options)


def warm_up_then_cosine(optimizer):
    warm_up = torch_schedulers.LinearLR(optimizer, start_factor=0.01, total_iters=3)
    cosine = torch_schedulers.CosineAnnealingLR(optimizer, STEPS)
    return torch_schedulers.SequentialLR(optimizer, [warm_up, cosine], milestones=[3])


def relative_adafactor(model):
    return Adafactor(lora_parameters(model).values(), lr=None, relative_step=True, scale_parameter=True)


def grouped(a, b):
    def build(model):
        named = lora_parameters(model).items()
        rates = {"lora_A": a, "lora_B": b}
        return torch.optim.AdamW(
            [{"params": [p for n, p in named if f in n], "lr": lr} for f, lr in rates.items()]
        )

    return build


def rate(lr):
    return lambda model: adamw(model, lr)


# name -> (optimizer of a model, its scheduler or a schedule by hand, whether the gates' warm-up follows the rates')
SCHEDULES = {
    **{kind.value: (rate(PEAK), transformers_scheduler(kind.value), True) for kind in SchedulerType},
    "none": (rate(PEAK), None, True),
    "OneCycleLR": (rate(PEAK), scheduler("OneCycleLR", max_lr=PEAK, total_steps=10), True),
    "CyclicLR": (rate(PEAK), scheduler("CyclicLR", base_lr=1e-5, max_lr=PEAK, step_size_up=3), False),
    "StepLR": (rate(PEAK), scheduler("StepLR", step_size=3), True),
    "ExponentialLR": (rate(PEAK), scheduler("ExponentialLR", gamma=0.8), True),
    "CosineAnnealingWarmRestarts": (rate(PEAK), scheduler("CosineAnnealingWarmRestarts", T_0=3), True),
    "SequentialLR": (rate(PEAK), warm_up_then_cosine, True),
    "Noam": (
        rate(1.0),
        scheduler("LambdaLR", lr_lambda=lambda i: 1e-4 * min((i + 1) / 3, 9 / (i + 1) ** 2)),
        False,
    ),
    "absolute rates over a base of 1": (
        rate(1.0),
        scheduler("LambdaLR", lr_lambda=lambda i: 1e-4 / (i + 1)),
        False,
    ),
    "warm-up from 0 by hand": (rate(0.0), by_hand(lambda i: PEAK * min(1, i / 3)), False),
    "warm-up from a thousandth by hand": (
        rate(1e-6),
        by_hand(lambda i: PEAK * min(1, (i + 0.003) / 3)),
        False,
    ),
    "decay by hand": (rate(PEAK), by_hand(lambda i: PEAK * 0.5**i), True),
    "Adafactor, relative steps": (relative_adafactor, None, True),
    "Adafactor, relative steps and schedule": (relative_adafactor, AdafactorSchedule, True),
    "lora_A at rate 0": (grouped(0.0, PEAK), None, True),
    "LoRA+": (grouped(PEAK / 16, PEAK), transformers_scheduler("linear"), True),
}
BY_HAND = {name for name in SCHEDULES if name.endswith("by hand")}


class Loop:
    """A bare loop under one of the schedules; it can be left with its state on disk, and entered again from there."""

    def __init__(self, name):
        self.name, (optimizer, schedule, _) = name, SCHEDULES[name]
        self.model = peft_model(init="warm")
        self.optimizer = optimizer(self.model)
        self.scheduler = schedule(self.optimizer) if schedule and name not in BY_HAND else None
        self.runtime = attach(
            self.model, self.optimizer, side="write", gate_lr=GATE_LR, coordinator_lr=THETA_LR
        )

    def run(self, first, last):
        """Rates of the trainer's steps (the largest of the groups') and shares of the gates' and of Θ's, one a step."""
        rates, shares = [], []
        self.model.train()
        for step in range(first, last):
            if self.name in BY_HAND:
                SCHEDULES[self.name][1](self.optimizer, step)
            current = [group["lr"] for group in self.optimizer.param_groups]
            loss_of(self.model, "llama", step).backward()
            self.optimizer.step()
            rates.append(1.0 if self.name.startswith("Adafactor") else max(map(float, current)))
            gates, theta = (group["lr"] for group in self.runtime._optimizer.param_groups)
            assert gates / GATE_LR == pytest.approx(theta / THETA_LR)
            shares.append(gates / GATE_LR)
            if self.scheduler is not None:
                follows_loss = self.name in ("reduce_lr_on_plateau", "greedy")
                self.scheduler.step(*([5.0 + step] if follows_loss else []))  # a loss that gets worse
            self.optimizer.zero_grad()
        return rates, shares

    def save(self, folder):
        save_state(self.runtime, folder)
        parts = [self.optimizer.state_dict()] + ([self.scheduler.state_dict()] if self.scheduler else [])
        adapter = [p.detach().clone() for p in lora_parameters(self.model).values()]
        return copy.deepcopy(parts), adapter

    def load(self, folder, parts, adapter):
        with torch.no_grad():
            for parameter, value in zip(lora_parameters(self.model).values(), adapter, strict=True):
                parameter.copy_(value)
        for part, saved in zip((self.optimizer, self.scheduler), parts, strict=False):
            part.load_state_dict(copy.deepcopy(saved))
        load_state(self.runtime, folder)


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_of_the_map_are_shares_of_the_peak_and_survive_a_resume(name, tmp_path):
    whole = Loop(name)
    start = whole.runtime.state_dict()
    rates, shares = whole.run(0, HALF)
    saved = whole.save(tmp_path)
    more_rates, more_shares = whole.run(HALF, STEPS)
    rates, shares = rates + more_rates, shares + more_shares

    follows_warm_up = SCHEDULES[name][2]
    peak = max(rates)
    assert whole.runtime.metrics()["structlora/peak_lr"] == pytest.approx(peak)
    for step, (rate, share) in enumerate(zip(rates, shares, strict=True)):
        expected = rate / (peak if follows_warm_up else max(rates[: step + 1]) or 1.0)
        assert share == pytest.approx(expected, rel=1e-6), f"step {step} of {rates}"
    end = whole.runtime.state_dict()
    for part in ("logits", "theta"):
        assert all((end[n] - start[n]).abs().max() > 0.05 for n in start if n.endswith(part)), "never trained"

    resumed = Loop(name)
    resumed.load(tmp_path, *saved)
    _, shares_again = resumed.run(HALF, STEPS)
    assert shares_again == shares[HALF:]
    again = resumed.runtime.state_dict()
    assert end.keys() == again.keys() and all(torch.equal(value, again[n]) for n, value in end.items())


def test_a_skipped_step_does_not_end_a_warm_up():
    """An overflow, as fp16 has them at the start, lets the scheduler wait: the same rate comes twice."""
    loop = Loop("linear")
    loop.run(0, 2)
    loss_of(loop.model, "llama", 2).backward()
    next(iter(lora_parameters(loop.model).values())).grad.fill_(float("nan"))
    loop.optimizer.step()
    loop.optimizer.zero_grad()
    assert loop.runtime.skipped_steps == 1
    _, shares = loop.run(2, 3)
    assert shares == [pytest.approx(2 / 3)]


def test_declared_peaks_are_believed_within_reason():
    for first, believed in ((2 / LONGEST_WARM_UP, True), (0.5 / LONGEST_WARM_UP, False)):
        share = ScheduleShare()
        assert share.advance(Rate(0.0, 1.0)) == 0.0
        assert share.advance(Rate(first, 1.0)) == pytest.approx(first if believed else 1.0)
        assert share.advance(Rate(0.9 * first, 1.0)) == pytest.approx(0.9)  # what falls was no warm-up


def test_long_warm_ups_are_followed():
    steps = 4 * LONGEST_WARM_UP
    share = ScheduleShare()
    for step in (1, 2, steps // 2, steps):
        assert share.advance(Rate(PEAK * step / steps, PEAK)) == pytest.approx(step / steps)


@pytest.mark.slow
@one_at_a_time
def test_deepspeed_reads_the_groups_of_the_lora_parameters():
    """A first group of other parameters has a schedule of its own; under DeepSpeed's WarmupLR its configured rate is the peak."""
    pytest.importorskip("deepspeed")
    done = run([sys.executable, str(Path(__file__).parents[1] / "support" / "deepspeed_groups.py")])
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    expected = {"groups": [1.0, 0.5, 0.25], "WarmupLR": [0.0, 0.0, 0.5]}  # DeepSpeed repeats the first rate
    for stage in ("1", "2", "3", "1 bf16"):
        for name, shares in expected.items():
            assert found[stage][name] == pytest.approx(shares, abs=1e-6), (stage, name)
