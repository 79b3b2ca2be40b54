"""The store: one JSON line per run, in `results/`, one file per task. Lines are only ever added."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
KEY = ("task", "method", "rank", "examples", "lr", "seed")


def key_of(line: dict) -> tuple:
    """What tells a run from all others."""
    return tuple(line[name] for name in KEY)


def read(results: Path = RESULTS) -> list[dict]:
    """All lines of the store."""
    return [
        json.loads(line)
        for path in sorted(results.glob("*.jsonl"))
        for line in path.read_text().splitlines()
        if line
    ]


def append(line: dict, results: Path = RESULTS) -> None:
    """Add a run, whole or not at all, whoever else is writing."""
    results.mkdir(parents=True, exist_ok=True)
    with open(results / f"{line['task']}.jsonl", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(line) + "\n")


def packed(right: list[bool]) -> str:
    """Booleans as '<how many>:<bits in hexadecimal, the first one leading>'."""
    bits = "".join("01"[r] for r in right)
    return f"{len(bits)}:{int(bits, 2):x}"


def unpacked(text: str) -> list[bool]:
    """What `packed` took."""
    count, bits = text.split(":")
    return [bit == "1" for bit in f"{int(bits, 16):0{count}b}"]
