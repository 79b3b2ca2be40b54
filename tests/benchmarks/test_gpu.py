"""`make gpu` on a CPU: every row has passed, or was skipped and says why; failures are rows too."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import page, rows
from tests.support.launching import ENVIRONMENT, ROOT, one_at_a_time

pytestmark = pytest.mark.slow


def rehearse(output, *arguments: str) -> tuple[dict, str]:
    start = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--minutes", "30"]
    done = subprocess.run(
        [*start, "--output", str(output), *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
    )
    written = (output / "gpu.md").read_text(encoding="utf-8") if (output / "gpu.md").exists() else done.stderr
    assert done.returncode == 0, written[-4000:]
    return json.loads((output / "gpu.json").read_text(encoding="utf-8")), written


def assert_all_is_told(report: dict, written: str) -> None:
    for part in report["parts"].values():
        assert part["rows"]
        for row in part["rows"]:
            assert row["outcome"] == "passed" or (row["outcome"] == "skipped" and row["reason"]), row
            assert f"| {row['name']} | {row['outcome']}" in written and row["reason"] in written
    assert "A rehearsal on a CPU" in written


def names(report: dict, part: str) -> list[str]:
    return [row["name"] for row in report["parts"][part]["rows"]]


def test_rehearsal(tmp_path):
    report, written = rehearse(tmp_path, "--parts", "promises", "around", "cost")
    assert_all_is_told(report, written)
    assert {name[0] for name in names(report, "promises")} == set("1247")
    for precision in ("fp32", "bf16", "fp16 with GradScaler"):
        assert f"2 chain rule[{precision}-llama]" in names(report, "promises")
    for what in (
        "flash attention",
        "flash attn package",
        "torch compile",
        "fused lora kernels",
        "set up[4-bit",
    ):
        assert any(name.startswith(what) for name in names(report, "around"))
    figures = {row["name"]: row["figures"] for row in report["parts"]["cost"]["rows"]}
    for targets in ("q+v", "all linear"):
        ours, lora = (figures[f"tiny, {targets}, {method}"] for method in ("structlora", "lora"))
        assert ours["time to LoRA's"] == pytest.approx(ours["step ms"] / lora["step ms"], rel=1e-3)
        assert (
            ours["trained parameters"] == lora["trained parameters"]
            and ours["peak GB"] >= lora["peak GB"] > 0
        )
        assert 0 < ours["added ms"] < ours["step ms"]


@one_at_a_time
def test_rehearsal_of_several_processes(tmp_path):
    report, written = rehearse(tmp_path, "--parts", "engines")
    assert_all_is_told(report, written)
    (row,) = report["parts"]["engines"]["rows"]
    assert row["name"].startswith("3 fp32 weights") and row["figures"]["processes"] == 2


@pytest.fixture
def rehearsed_with(tmp_path, monkeypatch):
    """The command with some other part in the place of `cost`: its exit status, report and page."""

    def run(script: str, minutes: float = 1.0):
        monkeypatch.setattr(command, "command", lambda *_: [sys.executable, "-c", script])
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "gpu",
                "--device",
                "cpu",
                "--parts",
                "cost",
                "--minutes",
                str(minutes),
                "--output",
                str(tmp_path),
            ],
        )
        status = command.main()
        report = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
        return status, report["parts"]["cost"]["rows"], (tmp_path / "gpu.md").read_text(encoding="utf-8")

    return run


PLAN = "import time; from benchmarks.gpu import rows; rows.plan(['first', 'second']); rows.add(rows.Row('first', 'passed'));"


@pytest.mark.parametrize(
    "script, minutes, why",
    [
        (PLAN + "raise SystemExit('broken')", 1.0, "its process ended with code 1\nbroken"),
        (PLAN + "time.sleep(600)", 0.1, "did not end within 6 s"),
    ],
    ids=["crash", "time is up"],
)
def test_what_a_part_leaves_undone_has_failed(script, minutes, why, rehearsed_with):
    status, (first, second), written = rehearsed_with(script, minutes)
    assert status == 1
    assert (first["outcome"], second["outcome"]) == (rows.PASSED, rows.FAILED)
    assert second["reason"].startswith(why) and "`second` failed:" in written


def test_a_part_without_rows_has_failed(rehearsed_with):
    status, (row,), _ = rehearsed_with("pass")
    assert status == 1 and row["outcome"] == rows.FAILED


def test_a_gpu_is_asked_for():
    start = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(
        start, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, cwd=ROOT
    )
    assert done.returncode == 2 and "PyTorch finds no CUDA device" in done.stderr


def test_page_keeps_tables_whole():
    found = [
        {
            "name": "a|b",
            "outcome": rows.FAILED,
            "reason": "x\n```",
            "seconds": 1.0,
            "figures": {"ratio": 1.23456},
        }
    ]
    report = {
        "machine": {"device": "cuda", "gpus": ["a GPU"], "packages": {}},
        "outcomes": {rows.FAILED: 1},
        "seconds": 1.0,
        "parts": {"cost": {"seconds": 1.0, "at most": 2.0, "rows": found}},
    }
    written = page.write(report)
    assert "| a\\|b | failed | ratio 1.235 | 1.0 |" in written and "rehearsal" not in written
    assert written.count("```") == 2
