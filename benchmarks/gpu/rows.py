"""A plugin of pytest (`-p benchmarks.gpu.rows`): appends what each test has found to the file that `GPU_ROWS` names, as JSON.

A test has a row from the start, so that one which a crash or the end of the time left out is seen to be missing.
"""

from __future__ import annotations

import json
import os

FILE = "GPU_ROWS"
REASON_LENGTH = 600  # characters of an error that a row keeps, its last ones


def pytest_collection_finish(session):
    for item in session.items:
        _append(item.nodeid, outcome="failed", reason="did not run to its end")


def pytest_runtest_logreport(report):
    # A test that is skipped or fails before it is called has no report of the call.
    if report.when == "call" or not report.passed:
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else report.longreprtext
        found = {"seconds": round(report.duration, 1), "figures": dict(report.user_properties)}
        _append(report.nodeid, outcome=report.outcome, reason=reason[-REASON_LENGTH:], **found)


def _append(nodeid: str, **found) -> None:
    name = nodeid.split("::", 1)[1].removeprefix("test_").replace("_", " ")
    with open(os.environ[FILE], "a", encoding="utf-8") as file:
        file.write(json.dumps({"name": name, "seconds": 0.0, "figures": {}, **found}) + "\n")
