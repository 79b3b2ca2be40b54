"""Slices of the width, in as many processes as do not divide it."""

from __future__ import annotations

import pytest

from tests.support.launching import one_at_a_time, said_by, torchrun

pytestmark = one_at_a_time


@pytest.mark.parametrize("world", [1, 4])
def test_slices_are_those_of_the_whole(world):
    found = said_by("slicing_job", *torchrun(world))
    assert len(found) > 40
    of_width = found.pop("sums")
    assert max(of_width.values()) <= 1e-5, of_width
    assert {
        name: values for name, values in found.items() if any(values.values())
    } == {}  # moving changes no value
