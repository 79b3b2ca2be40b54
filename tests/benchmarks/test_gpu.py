"""`make gpu` on a CPU: every row has passed, or was skipped and says why; failures are rows too."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.gpu import __main__ as command
from tests.support.launching import ENVIRONMENT, ROOT, one_at_a_time

pytestmark = pytest.mark.slow


@one_at_a_time
def test_rehearsal(tmp_path):
    start = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--minutes", "30"]
    done = subprocess.run([*start, "--output", tmp_path], env=ENVIRONMENT, cwd=ROOT)
    written = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert done.returncode == 0, written[-4000:]
    assert "nothing here was measured on a GPU" in written
    parts = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["parts"]
    for row in (row for part in parts.values() for row in part):
        assert row["outcome"] == "passed" or (row["outcome"] == "skipped" and row["reason"]), row
        assert f"| {row['name']} " in written and row["reason"] in written
    names = {part: [row["name"] for row in found] for part, found in parts.items()}
    assert {name[0] for name in names["promises"]} == set("1247")
    for precision in ("fp32", "bf16", "fp16 with GradScaler"):
        assert f"2 chain rule[{precision}-llama]" in names["promises"]
    ways = ("flash attention", "flash attn package", "torch compile", "fused lora kernels", "set up[4-bit")
    assert all(any(name.startswith(way) for name in names["around"]) for way in ways)
    (row,) = parts["engines"]
    assert row["name"].startswith("3 fp32 weights") and row["figures"]["processes"] == 2
    figures = {row["name"]: row["figures"] for row in parts["cost"]}
    for targets in ("q+v", "all linear"):
        ours, lora = (figures[f"step[tiny-{targets}-{method}]"] for method in ("structlora", "lora"))
        assert ours["step ms / LoRA's"] == pytest.approx(ours["step ms"] / lora["step ms"])
        assert ours["trained parameters"] == lora["trained parameters"]
        assert ours["peak GB"] >= lora["peak GB"] > 0 and 0 < ours["added ms"] < ours["step ms"]


@pytest.mark.parametrize(
    "second, minutes, why",
    [("os._exit(3)", 1.0, "ended with status 3"), ("time.sleep(600)", 0.3, "did not end within 18 s")],
    ids=["crash", "time is up"],
)
def test_what_a_part_leaves_undone_has_failed(second, minutes, why, tmp_path, monkeypatch):
    """With some other tests in the place of a part."""
    part = tmp_path / "test_part.py"
    tests = f"def test_first(): pass\ndef test_second(): {second}\n"
    part.write_text(f"import os, time, pytest\npytestmark = pytest.mark.cuda\n{tests}")
    monkeypatch.setitem(command.PARTS, "cost", str(part))
    options = ["--device", "cpu", "--parts", "cost", "--minutes", str(minutes), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu", *options])
    assert command.main() == 1
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["parts"]["cost"]
    outcomes = {row["name"]: row["outcome"] for row in rows}
    assert outcomes == {"first": "passed", "second": "failed", "cost": "failed"}
    assert rows[-1]["reason"].startswith(why)
    assert "`second` failed:" in (tmp_path / "gpu.md").read_text(encoding="utf-8")


def test_a_gpu_is_asked_for():
    start = [sys.executable, "-m", "benchmarks.gpu"]
    environment = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(start, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 2 and "PyTorch finds no CUDA device" in done.stderr
