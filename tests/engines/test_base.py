"""What all engines share: what gradients are like, and whether other code has written."""

from __future__ import annotations

import math

import pytest
import torch

from structlora_trl.engines import base
from structlora_trl.engines.base import differs, flags_of

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


def test_a_write_is_seen_whatever_the_dtypes(monkeypatch):
    """In any lot of what is compared together; shapes do not matter, and NaN is what NaN is."""
    monkeypatch.setattr(base, "_COMPARED_BYTES", 16)
    found = [torch.tensor([1.0, math.nan]), torch.empty(0), torch.ones(3, 4), HALF, torch.zeros(2)]
    for written in (None, 0, 2, 3, 4):
        expected = [x.flatten().clone() for x in found]
        if written is not None:
            expected[written][0] = 5
        assert differs(expected, found, torch.device("cpu")) == (written is not None)
    assert differs([], [], torch.device("cpu")) == 0
