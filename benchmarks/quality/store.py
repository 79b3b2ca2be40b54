"""The store in `results/`: one JSON line per run. New ones are added to `new.jsonl`; `pack` moves them into `runs.jsonl.xz`."""

from __future__ import annotations

import fcntl
import json
import lzma
import os
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
PACKED, NEW = "runs.jsonl.xz", "new.jsonl"
KEY = ("task", "method", "rank", "examples", "lr", "seed")


def key_of(line: dict) -> tuple:
    """Return what tells a run from all others."""
    return tuple(line[name] for name in KEY)


def read(results: Path = RESULTS) -> list[dict]:
    """Return all lines of the store."""
    texts = []
    if (results / PACKED).exists():
        texts.append(lzma.decompress((results / PACKED).read_bytes()).decode())
    if (results / NEW).exists():
        texts.append((results / NEW).read_text())
    return [json.loads(line) for text in texts for line in text.splitlines()]


def append(line: dict, results: Path = RESULTS) -> None:
    """Add a run, whole or not at all, whoever else is writing."""
    results.mkdir(parents=True, exist_ok=True)
    with open(results / NEW, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(line) + "\n")


def pack(results: Path = RESULTS) -> int:
    """Move new lines into the compressed file, sorted, which is what git keeps. Return how many runs it has."""
    found = {key_of(line): line for line in read(results)}
    text = "".join(json.dumps(found[key]) + "\n" for key in sorted(found))
    unfinished = results / f"{PACKED}.unfinished"
    unfinished.write_bytes(lzma.compress(text.encode(), preset=9))
    os.replace(unfinished, results / PACKED)
    (results / NEW).unlink(missing_ok=True)
    return len(found)
