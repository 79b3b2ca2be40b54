"""The trainer's learning-rate schedule as the map's optimizer follows it: the rate as a share of the peak.

A schedule does not say what its peak is. torch's and Transformers' schedulers write the rate they start from
into `initial_lr`, which is the peak of most of them, but not of OneCycleLR or CyclicLR, nor of lambdas over a
base rate of 1 (Noam); rates set by hand write nothing. So the peak is the largest rate seen so far; the declared
peak is used until the rate first drops. (Rates stay equal for an epoch where the scheduler is stepped once an
epoch.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

# A declared peak this large, and this many times the first rate or more, is no rate but the base that a
# lambda multiplies (Noam's base of 1.0).
LARGEST_PEAK, LONGEST_WARM_UP = 0.5, 5000


class Rate(NamedTuple):
    """A step's learning rate, and the peak that the scheduler declares, 0.0 where it declares none."""

    current: float
    declared_peak: float


def rate_of(groups: Iterable[dict]) -> Rate:
    """The learning rate of parameter groups: the largest among them (LoRA+ has two; one may be 0)."""
    groups = list(groups)
    if any(group.get("lr") is None or group.get("relative_step") for group in groups):
        return Rate(1.0, 0.0)  # Adafactor computes its rate inside the step, relative to the parameters
    declared = [group.get(name) or 0.0 for group in groups for name in ("initial_lr", "max_lr")]
    return Rate(max(float(group["lr"]) for group in groups), max(map(float, declared)))


class ScheduleShare:
    """What share of the schedule's peak a rate is: never above 1, and 0 only where the rate is 0.

    Args:
        largest (`float`, *optional*, defaults to 0.0): the largest rate of any step so far.
        warms_up (`bool`, *optional*, defaults to True): whether no rate so far was below those before it.
        peak (`float`, *optional*, defaults to 0.0): the peak that the last step's share was of.
    """

    def __init__(self, largest: float = 0.0, warms_up: bool = True, peak: float = 0.0):
        self.largest, self.warms_up, self.peak = float(largest), bool(warms_up), float(peak)

    def advance(self, rate: Rate) -> float:
        """Take in the rate of a step that counts; its share of the peak."""
        if rate.current > 0 and self.largest == 0:
            self.warms_up = rate.declared_peak < max(LARGEST_PEAK, LONGEST_WARM_UP * rate.current)
        elif rate.current < self.largest:
            self.warms_up = False
        self.largest = max(self.largest, rate.current)
        self.peak = max(self.largest, rate.declared_peak) if self.warms_up else self.largest
        return rate.current / self.peak if self.peak else 0.0
