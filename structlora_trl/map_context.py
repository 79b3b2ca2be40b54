"""The torch state that the map runs in, whatever surrounds it: fp32, no autocast, no inference mode."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch

Method = TypeVar("Method", bound=Callable)

# torch.set_float32_matmul_precision and the flags behind it (TF32 on CUDA, bf16 in oneDNN).
_MATMULS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@contextmanager
def map_context(device: torch.device) -> Iterator[None]:
    """Full fp32 precision within, whatever autocast, inference mode, dtype or matmul precision is around it.

    Args:
        device (`torch.device`): where the map runs.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in {device.type, "cpu"}:
            if torch.is_autocast_enabled(kind):
                # It keeps casts of the weights that the next forward would take for those that stand then.
                stack.callback(torch.clear_autocast_cache)
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_dtype() != torch.float32:  # of AdamW's count of steps, for one
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        for matmul in _MATMULS:
            if matmul.fp32_precision not in ("ieee", "none"):
                stack.callback(setattr, matmul, "fp32_precision", matmul.fp32_precision)
                matmul.fp32_precision = "ieee"
        yield


def in_map_context(method: Method) -> Method:
    """Run a method of the runtime in `map_context`."""

    @functools.wraps(method)
    def entered(self, *args, **kwargs):
        with map_context(self.device):
            return method(self, *args, **kwargs)

    return entered
