"""Readers within a step, and weights that others write, where parameters are sharded."""

from __future__ import annotations

import pytest

from tests.support.launching import said_by


@pytest.mark.slow
def test_fsdp2():
    found = said_by("fsdp2_readers")
    assert found.pop("effect") > 0.01
    assert all(value <= 1e-5 for value in found.values()), found
