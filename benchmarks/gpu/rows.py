"""Rows: what one check or measurement has found. A part appends them to a file, so that they outlive it.

As a plugin of pytest (`-p benchmarks.gpu.rows`) it writes a row for each test. The file is named by `GPU_ROWS`.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
FILE = "GPU_ROWS"
REASON_LENGTH = 600  # characters of an error that a row keeps, its last ones


@dataclass(frozen=True)
class Row:
    """One check or measurement.

    Args:
        name (`str`): what it is.
        outcome (`str`): passed, failed or skipped.
        reason (`str`): why it failed or was skipped.
        seconds (`float`): how long it took.
        figures (`dict`): what it measured.
    """

    name: str
    outcome: str
    reason: str = ""
    seconds: float = 0.0
    figures: dict = field(default_factory=dict)


def plan(names: list[str]) -> None:
    """Say what is to come, so that what is missing in the end is known."""
    _append({"planned": names})


def add(row: Row) -> None:
    _append(asdict(row))


def read(file: Path, missing: str) -> list[Row]:
    """All rows; a planned one that is not there has failed, and `missing` says why."""
    lines = (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    )
    planned = [name for line in lines if "planned" in line for name in line["planned"]]
    found = {line["name"]: Row(**line) for line in lines if "planned" not in line}
    return [found.get(name) or Row(name, FAILED, missing) for name in dict.fromkeys([*planned, *found])]


def _append(line: dict) -> None:
    with open(os.environ[FILE], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


# --- pytest's hooks ------------------------------------------------------------------------------------------------


def pytest_collection_finish(session):
    plan([_name(item.nodeid) for item in session.items])


def pytest_runtest_logreport(report):
    # A test that is skipped or fails before it is called has no report of the call.
    if report.when == "call" or (report.when == "setup" and not report.passed):
        figures = dict(report.user_properties)
        add(Row(_name(report.nodeid), report.outcome, _reason(report), report.duration, figures))
    elif report.failed:
        add(Row(_name(report.nodeid), FAILED, _reason(report), report.duration))


def _name(nodeid: str) -> str:
    return nodeid.split("::", 1)[1].removeprefix("test_").replace("_", " ")


def _reason(report) -> str:
    if report.skipped:
        return report.longrepr[2].removeprefix("Skipped: ")
    if report.failed:
        return report.longreprtext[-REASON_LENGTH:]
    return ""
