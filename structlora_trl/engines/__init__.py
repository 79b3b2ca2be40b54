"""Engines: who owns the parameters during an optimizer step, behind one small interface."""

from .base import Engine, refuse_distributed
from .torch import TorchEngine

__all__ = ["Engine", "TorchEngine", "refuse_distributed"]
