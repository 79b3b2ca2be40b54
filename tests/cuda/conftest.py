from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.support.device import CHOSEN, ON_GPU


@pytest.fixture
def device() -> str:
    """The GPU, or the CPU in a rehearsal."""
    if ON_GPU:
        assert torch.cuda.is_available(), "PyTorch finds no CUDA device"
    return CHOSEN


@pytest.fixture
def only_on_gpu(device):
    """Skips on a CPU; call it with what the CPU lacks."""

    def check(what: str) -> None:
        if device != "cuda":
            pytest.skip(f"a CPU has no {what}")

    return check


@pytest.fixture
def deterministic(device):
    """Kernels that give the same bits twice: some of CUDA's add up in an order of chance, fused attention's among them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.use_deterministic_algorithms(False)
