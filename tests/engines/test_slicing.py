"""Slices of the width, in as many processes as do not divide it."""

from __future__ import annotations

import json

import pytest

from tests.support.launching import ROOT, one_at_a_time, run, torchrun

pytestmark = one_at_a_time


@pytest.mark.parametrize("world", [1, 4])
def test_slices_are_those_of_the_whole(world):
    done = run([*torchrun(world), str(ROOT / "tests" / "support" / "slicing_job.py")])
    lines = [line.removeprefix("FOUND ") for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert done.returncode == 0 and lines, (done.stdout + done.stderr)[-4000:]
    found = json.loads(lines[0])
    assert len(found) > 40
    of_width = found.pop("sums")
    assert max(of_width.values()) <= 1e-5, of_width
    assert {
        name: values for name, values in found.items() if any(values.values())
    } == {}  # moving changes no value
