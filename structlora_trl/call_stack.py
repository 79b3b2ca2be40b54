"""Whether a call still runs: a note made at its start is stale once an exception or an interrupt ended it."""

from __future__ import annotations

import sys
from types import FrameType


def is_running(frame: FrameType) -> bool:
    """Whether the call of a frame is on this thread's stack."""
    current = sys._getframe(1)
    while current is not None and current is not frame:
        current = current.f_back
    return current is not None


def caller_in(file: str) -> FrameType | None:
    """The innermost call of a function of some source file that is on the stack."""
    current = sys._getframe(1)
    while current is not None and current.f_code.co_filename != file:
        current = current.f_back
    return current
