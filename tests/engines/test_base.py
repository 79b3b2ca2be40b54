"""What all engines share: what gradients are like, and how a schedule's rate is read."""

from __future__ import annotations

import math

import pytest
import torch

from structlora_trl.engines.base import flags_of

HALF = torch.full((9,), 6e4, dtype=torch.float16)


@pytest.mark.parametrize(
    ("tensors", "is_bad", "is_moving"),
    [
        ([], False, False),
        ([torch.empty(0)], False, False),  # a rank that owns nothing
        ([torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)], False, False),
        ([HALF, torch.ones(3), torch.zeros(2, dtype=torch.bfloat16)], False, True),
        ([torch.ones(2, dtype=torch.float16), torch.tensor([1.0, math.nan])], True, True),
        ([torch.tensor([-math.inf], dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64)], True, True),
    ],
)
def test_gradients_are_told_apart_whatever_their_dtypes(tensors, is_bad, is_moving):
    assert flags_of(tensors, torch.device("cpu")).tolist() == [is_bad, is_moving]
