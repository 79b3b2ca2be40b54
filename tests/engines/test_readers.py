"""Readers within a step, and weights that others write, where parameters are sharded."""

from __future__ import annotations

import json
import sys

import pytest

from tests.support.launching import run


@pytest.mark.slow
def test_fsdp2():
    done = run([sys.executable, "-m", "tests.support.fsdp2_readers"])
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("effect") > 0.01
    assert all(value <= 1e-5 for value in found.values()), found
