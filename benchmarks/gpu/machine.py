"""What the figures were measured on."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

PACKAGES = (
    *(
        "torch",
        "transformers",
        "trl",
        "peft",
        "accelerate",
        "deepspeed",
        "bitsandbytes",
        "triton",
        "axolotl",
        "flash-attn",
    ),
    "structlora-trl",
)
BYTES_PER_GB = 1e9


def describe(device: str) -> dict:
    found = {
        "device": device,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }
    if device == "cuda":
        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found |= {
            "gpus": [
                f"{p.name}, {p.total_memory / BYTES_PER_GB:.0f} GB, {p.major}.{p.minor}" for p in properties
            ],
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
