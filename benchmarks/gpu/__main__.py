"""Check StructLoRA on the GPUs of this machine, and measure what it costs there: one command, one JSON file, one page.

    python -m benchmarks.gpu                        # all of it, within 10 minutes; needs a GPU
    python -m benchmarks.gpu --device cpu           # the same code on a CPU: a rehearsal, tiny shapes
    python -m benchmarks.gpu --device cpu --quick   # less of it
    python -m benchmarks.gpu --parts engines cost   # some of the parts

Writes `gpu.json` and `gpu.md` into `gpu-output/`. A part is a file of tests, in a process of its own with a share of the
time that is left; what does not end in time, or fails, is a row of the page, and the other parts go on.
The exit status is 1 where a row has failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import torch

from . import rows

ROOT = Path(__file__).resolve().parents[2]
PARTS = {
    "promises": "tests/cuda/test_promises.py",
    "engines": "tests/cuda/test_engines.py",
    "around": "tests/cuda/test_around.py",
    "cost": "benchmarks/gpu/cost.py",
}
SHARES = {"promises": 2, "engines": 4, "around": 2, "cost": 5}  # weights of each part's share of the time
MINUTES = 9.5  # what remains of 10 is for starting and writing
PACKAGES = "torch transformers trl peft accelerate deepspeed bitsandbytes triton axolotl flash-attn structlora-trl".split()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="one model family, one engine, two methods")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all parts (default: {MINUTES})")
    parser.add_argument("--output", type=Path, default=Path("gpu-output"))
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device; `--device cpu` runs the same code on a CPU")

    started = time.perf_counter()
    report = {"device": arguments.device, "machine": machine(arguments.device), "parts": {}}
    for number, part in enumerate(arguments.parts):
        share = SHARES[part] / sum(SHARES[p] for p in arguments.parts[number:])
        seconds = (60 * arguments.minutes - (time.perf_counter() - started)) * share
        report["parts"][part] = run_part(part, arguments.device, arguments.quick, seconds)
    report["seconds"] = round(time.perf_counter() - started, 1)
    report["outcomes"] = Counter(row["outcome"] for found in report["parts"].values() for row in found)

    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "gpu.md").write_text(page(report), encoding="utf-8")
    print(f"{dict(report['outcomes'])} in {report['seconds']} s: {arguments.output / 'gpu.md'}")
    return 1 if report["outcomes"]["failed"] else 0


def machine(device: str) -> list[str]:
    """Return what the figures are measured on."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    nccl = f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if device == "cuda" else ""
    versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return [
        *(f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus if device == "cuda"),
        f"Python {platform.python_version()} on {platform.platform()}, CUDA {torch.version.cuda}{nccl}",
        ", ".join(f"{name} {versions[name]}" for name in PACKAGES if name in versions),
    ]


def run_part(part: str, device: str, quick: bool, seconds: float) -> list[dict]:
    """Run one part for so many seconds at most. Return its rows, and one of its output where it ended badly."""
    print(f"{part}: {seconds:.0f} s at most", flush=True)
    marks = "cuda and not slow" if quick else "cuda"
    command = [sys.executable, "-m", "pytest", "-q", "-p", rows.__name__, "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        file.touch()
        environment = {**os.environ, **variables(device), rows.FILE: str(file)}
        status, output = run_within(seconds, [*command, "-m", marks, PARTS[part]], environment)
        written = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = {row["name"]: row for row in written}  # the last one of each name counts
    if status not in (0, 1):  # 1: tests have failed, and say so
        how = f"did not end within {seconds:.0f} s" if status is None else f"ended with status {status}"
        reason = f"{how}\n{output[-rows.REASON_LENGTH :]}"
        found[part] = {"name": part, "outcome": "failed", "reason": reason, "seconds": 0.0, "figures": {}}
    return list(found.values())


def variables(device: str) -> dict[str, str]:
    """Return the environment of a part."""
    chosen = {"STRUCTLORA_DEVICE": device, "TOKENIZERS_PARALLELISM": "false"}
    if device == "cuda":
        return {**chosen, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # deterministic matrix products
    return {**chosen, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1"}


def run_within(seconds: float, command: list[str], environment: dict[str, str]) -> tuple[int | None, str]:
    """Return the exit status, None where the time was up, and what was printed."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)
    try:
        output, _ = process.communicate(timeout=max(seconds, 1))
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
        return None, process.communicate()[0]


def page(report: dict) -> str:
    """Return the report as Markdown."""
    on_cpu = "rehearsed on a CPU: nothing here was measured on a GPU"
    lines = [f"# StructLoRA {'on a GPU' if report['device'] == 'cuda' else on_cpu}", ""]
    lines += [", ".join(f"{count} {outcome}" for outcome, count in sorted(report["outcomes"].items())), ""]
    lines += [f"* {line}" for line in report["machine"]]
    for part, found in report["parts"].items():
        table = pd.DataFrame([shown(row) for row in found])
        lines += ["", f"## {part.capitalize()}", "", table.to_markdown(index=False, tablefmt="github")]
        for row in found:
            if row["outcome"] == "failed":
                lines += ["", f"`{row['name']}` failed:", "", "```text", row["reason"], "```"]
    return "\n".join([*lines, ""])


def shown(row: dict) -> dict:
    """Return the cells of a row, by their column."""
    outcome = f"skipped: {row['reason']}" if row["outcome"] == "skipped" else row["outcome"]
    figures = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row["figures"].items()]
    return {
        "what": row["name"],
        "outcome": outcome,
        "figures": "; ".join(figures),
        "seconds": row["seconds"],
    }


if __name__ == "__main__":
    sys.exit(main())
