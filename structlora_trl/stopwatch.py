"""Time spent on a device, measured without waiting for it."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType

import torch


class Stopwatch:
    """Adds up the time of its `with` blocks; a block inside another counts once.

    CUDA runs behind the host: a host clock would measure how long it takes to queue the work. There, events
    are queued with the work and read once they have passed, so that no block makes the host wait.

    Args:
        device (`torch.device`): where the blocks' work runs.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._on_cuda = device.type == "cuda"
        self._depth = 0
        self._milliseconds = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __enter__(self) -> None:
        if self._depth == 0:
            self._begin = self._now()
        self._depth += 1

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        if not self._on_cuda:
            self._milliseconds += 1000 * (self._now() - self._begin)
            return
        self._pending.append((self._begin, self._now()))
        while self._pending and self._pending[0][1].query():
            self._count_first()

    def take(self) -> float:
        """Milliseconds since the last call; waits for the blocks that still run."""
        while self._pending:
            self._pending[0][1].synchronize()
            self._count_first()
        taken, self._milliseconds = self._milliseconds, 0.0
        return taken

    def _now(self) -> torch.cuda.Event | float:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _count_first(self) -> None:
        begin, end = self._pending.popleft()
        self._milliseconds += begin.elapsed_time(end)
