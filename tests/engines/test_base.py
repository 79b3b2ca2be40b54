"""What all engines share: what gradients are like, and whether other code has written."""

from __future__ import annotations

import math

import pytest
import torch

from structlora_trl.engines import base
from structlora_trl.engines.base import checksums, flags_of

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
    """In any lot of what is summed together; shapes do not matter, and NaN is what NaN is."""
    monkeypatch.setattr(base, "_SUMMED_BYTES", 16)
    cpu, two = torch.device("cpu"), torch.tensor([1.0, math.nan])
    values = [two, torch.empty(0), torch.ones(3, 4), HALF, two.flip(0), torch.zeros(2), two.clone()]
    before = checksums(values, cpu)
    assert torch.equal(before, checksums([x.flatten().clone() for x in values], cpu))
    assert before.unique().numel() == len(values) - 2  # what is empty is as zeros are; `two` is there twice
    for place in (0, 2, 3, 4, 5, 6):
        changed = [x.clone() for x in values]
        changed[place].view(-1)[0] = 5
        assert (checksums(changed, cpu) != before).nonzero().flatten().tolist() == [place]
    assert checksums([], cpu).numel() == 0


@pytest.mark.parametrize("change", [torch.neg, lambda x: x.flip(0), lambda x: x.mT, lambda x: x.roll(1)])
def test_a_write_is_seen_that_leaves_the_same_magnitudes(change):
    """Signs, orders, rows that change places: a sum of the bits alone would be the same."""
    values = torch.rand(8, 8).add(1) * torch.tensor([1.0, -1.0]).repeat(4)
    before, after = (checksums([x], torch.device("cpu")) for x in (values, change(values)))
    assert before != after
