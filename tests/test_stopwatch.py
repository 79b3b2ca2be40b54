"""The stopwatch behind `map_ms`: on CUDA it counts the device's time, and no block waits for it."""

from __future__ import annotations

import time
import weakref

import pytest
import torch

from structlora_trl.stopwatch import Stopwatch


def test_blocks_add_up_and_a_block_inside_another_counts_once():
    stopwatch = Stopwatch(torch.device("cpu"))
    started = time.perf_counter()
    for _ in range(2):
        with stopwatch, stopwatch:
            time.sleep(0.01)
    passed = 1000 * (time.perf_counter() - started)
    assert 20 <= stopwatch.take() <= passed
    assert stopwatch.take() == 0


class Device:
    """A device that runs behind the host: work is queued, and done when somebody waits for it or time passes."""

    def __init__(self):
        self.queued, self.done, self.waits = 0.0, 0.0, 0
        self.events = weakref.WeakSet()

    def work(self, milliseconds: float):
        self.queued += milliseconds

    def event(self, enable_timing: bool):
        assert enable_timing
        self.events.add(event := Event(self))
        return event


class Event:
    def __init__(self, device):
        self.device = device

    def record(self, stream):
        assert stream == torch.device("cuda", 1)
        self.at = self.device.queued

    def query(self) -> bool:
        return self.device.done >= self.at

    def synchronize(self):
        self.device.waits += 1
        self.device.done = max(self.device.done, self.at)

    def elapsed_time(self, end) -> float:
        assert end.query()
        return end.at - self.at


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    return device


def test_cuda_time_is_the_devices_and_no_block_waits(device):
    stopwatch = Stopwatch(torch.device("cuda", 1))
    for _ in range(3):
        with stopwatch:
            device.work(5.0)
        device.work(100.0)  # not the stopwatch's
    assert device.waits == 0
    assert stopwatch.take() == 15.0
    assert device.waits > 0 and stopwatch.take() == 0


def test_events_that_have_passed_are_not_kept(device):
    stopwatch = Stopwatch(torch.device("cuda", 1))
    for _ in range(1000):  # a loop that never asks for metrics
        with stopwatch:
            device.work(1.0)
        device.done = device.queued
    assert len(device.events) <= 4
    assert stopwatch.take() == 1000.0
