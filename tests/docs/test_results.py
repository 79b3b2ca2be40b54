"""The committed runs of the benchmarks are whole, and the pages show what they give; `tests/benchmarks` has the rest."""

from __future__ import annotations

import json
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
    for path in store.RESULTS.glob("*.jsonl"):
        assert {json.loads(text)["task"] for text in path.read_text().splitlines()} == {path.stem}


def test_a_name_means_one_set_of_options(lines):
    """So that a default changes only with its runs."""
    for line in lines:
        assert line["structlora"] == methods.find(line["method"]).options(), store.key_of(line)


def test_pages_show_what_the_store_gives(lines):
    for page, text in report.written(lines).items():
        assert text == page.read_text(), "run `make bench-report`"


def test_intervals_in_the_text_stand_in_a_table():
    """So that a sentence changes with the runs that it tells of; which table is not known, nor which sign "below" has."""
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/quality/*.md")]
    shown, said = set(), []
    for page in pages:
        for line in page.read_text().splitlines():
            found = [(float(low), float(high)) for low, high in _INTERVAL.findall(line)]
            if line.startswith("|") and page.parent.name == "quality":
                shown |= {*found, *((-high, -low) for low, high in found)}
            else:
                said += [(page.name, line, interval) for interval in found]
    assert len(said) > 50, "the pages write intervals otherwise than this test reads them"
    assert [entry for entry in said if entry[-1] not in shown] == []
