"""The committed runs of the benchmarks are whole, and the pages show what they give; `tests/benchmarks` has the rest."""

from __future__ import annotations

import math
import re

import pytest

from benchmarks.quality import methods, report, store
from tests.support.launching import ROOT

# (-0.1 to +0.3), (0.2, -0.1 to +0.3; ...)
_INTERVAL = re.compile(r"[(,] ?([-+]?\d+\.\d+) to ([-+]?\d+\.\d+)[),;]")


@pytest.fixture(scope="module")
def lines():
    return store.read()


def test_every_line_is_well_formed_and_its_key_unique(lines):
    keys = [store.key_of(line) for line in lines]
    assert lines and len(set(keys)) == len(keys)
    for line in lines:
        for split in ("validation", "test"):
            assert 0 <= line[split]["accuracy"] <= 100 and math.isfinite(line[split]["nll"]), line
        assert line["trained"] > 0 and line["cpu_seconds"] > 0 and line["steps"] > 0, line


def test_a_name_means_one_set_of_options(lines):
    """So that a default changes only with its runs."""
    for line in lines:
        assert line["structlora"] == methods.find(line["method"]).options(), store.key_of(line)


def test_pages_show_what_the_store_gives(lines):
    for page, text in report.written(lines).items():
        assert text == page.read_text(encoding="utf-8"), "run `make bench-report`"


def test_intervals_stand_in_tables():
    """A sentence with an interval would not change with the runs."""
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for line in page.read_text(encoding="utf-8").splitlines():
            assert line.startswith("|") or not _INTERVAL.search(line), (page.name, line)
