"""Check StructLoRA on the GPUs of this machine, and measure what it costs there: one command, one JSON file, one page.

    python -m benchmarks.gpu                        # all of it, within 10 minutes; needs a GPU
    python -m benchmarks.gpu --device cpu           # the same code on a CPU: a rehearsal, tiny shapes
    python -m benchmarks.gpu --device cpu --quick   # less of it
    python -m benchmarks.gpu --parts engines cost   # some of the parts

Writes `gpu.json` and `gpu.md` into `gpu-output/`. Parts run one after the other, each in a process of its own with a share of
the time that is left; what does not end in time, or fails, is a row of the page, and the other parts go on.
The exit status is 1 where a row has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch

from . import machine, page, rows

ROOT = Path(__file__).resolve().parents[2]
TESTS = {"promises": "test_promises.py", "engines": "test_engines.py", "around": "test_around.py"}
SHARES = {"promises": 2, "engines": 4, "around": 2, "cost": 5}  # part -> weight of its share of the time
MINUTES = 9.5  # what remains of 10 is for starting and writing
GRACE = 5  # seconds that `cost` is told to end before it is stopped


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="one model family, one engine, two methods")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all parts (default: {MINUTES})")
    parser.add_argument("--output", type=Path, default=Path("gpu-output"))
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device; `--device cpu` runs the same code on a CPU")

    started = time.perf_counter()
    deadline = started + 60 * arguments.minutes
    report = {"machine": machine.describe(arguments.device), "quick": arguments.quick, "parts": {}}
    parts = [part for part in SHARES if part in arguments.parts]
    for number, part in enumerate(parts):
        share = SHARES[part] / sum(SHARES[p] for p in parts[number:])
        seconds = (deadline - time.perf_counter()) * share
        report["parts"][part] = run_part(part, arguments.device, arguments.quick, seconds)
    found = [row for part in report["parts"].values() for row in part["rows"]]
    report["seconds"] = round(time.perf_counter() - started, 1)
    report["outcomes"] = dict(Counter(row["outcome"] for row in found))

    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "gpu.md").write_text(page.write(report), encoding="utf-8")
    print(f"{report['outcomes']} in {report['seconds']} s: {arguments.output / 'gpu.md'}")
    return 1 if rows.FAILED in report["outcomes"] else 0


def run_part(part: str, device: str, quick: bool, seconds: float) -> dict:
    """Run one part for so many seconds at most: its rows, and the end of its output where it ended badly."""
    print(f"{part}: {seconds:.0f} s at most", flush=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        environment = {**os.environ, **variables(device), rows.FILE: str(file)}
        status, output = run_within(seconds, command(part, device, quick, seconds), environment)
        ended = f"its process ended with code {status}"
        ended = f"did not end within {seconds:.0f} s" if status is None else ended
        found = rows.read(file, missing=f"{ended}\n{output}")
    if not found or (status and all(row.outcome != rows.FAILED for row in found)):
        found.append(rows.Row(part, rows.FAILED, f"{ended}\n{output}"))
    took = {"seconds": round(time.perf_counter() - started, 1), "at most": round(seconds, 1)}
    return {**took, "rows": [asdict(row) for row in found]}


def command(part: str, device: str, quick: bool, seconds: float) -> list[str]:
    if part == "cost":
        options = ["--device", device, "--seconds", f"{max(seconds - GRACE, 1):.0f}"]
        return [sys.executable, "-m", "benchmarks.gpu.cost", *options, *(["--quick"] if quick else [])]
    tests = str(ROOT / "tests" / "cuda" / TESTS[part])
    marks = "cuda and not slow" if quick else "cuda"
    options = ["-q", "-p", rows.__name__, "-p", "no:cacheprovider", "-m", marks]
    return [sys.executable, "-m", "pytest", *options, tests]


def variables(device: str) -> dict[str, str]:
    """The environment of a part."""
    chosen = {
        "STRUCTLORA_DEVICE": device,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cuda":
        return {**chosen, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # deterministic matrix products
    return {**chosen, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1"}


def run_within(seconds: float, arguments: list[str], environment: dict[str, str]) -> tuple[int | None, str]:
    """The exit status, None where the time was up, and the end of what was printed."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment, start_new_session=True, **streams)
    status = None
    try:
        output, _ = process.communicate(timeout=max(seconds, 1))
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
        output, _ = process.communicate()
    return status, output[-rows.REASON_LENGTH :]


if __name__ == "__main__":
    sys.exit(main())
