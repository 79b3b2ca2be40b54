"""What all engines share: whether gradients hold NaN or Inf."""

from __future__ import annotations

import math

import pytest
import torch

from structlora_trl.engines.base import holds_nonfinite


@pytest.mark.parametrize(
    ("tensors", "is_bad"),
    [
        ([], False),
        ([torch.empty(0)], False),  # a rank that owns nothing
        (
            [torch.full((9,), 6e4, dtype=torch.float16), torch.ones(3), torch.ones(2, dtype=torch.bfloat16)],
            False,
        ),
        ([torch.ones(2, dtype=torch.float16), torch.tensor([1.0, math.nan])], True),
        ([torch.tensor([-math.inf], dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64)], True),
    ],
)
def test_nan_and_inf_are_found_whatever_the_dtypes(tensors, is_bad):
    assert bool(holds_nonfinite(tensors, torch.device("cpu"))) == is_bad
