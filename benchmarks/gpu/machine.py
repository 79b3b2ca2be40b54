"""What the figures were measured on."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

PACKAGES = "torch transformers trl peft accelerate deepspeed bitsandbytes triton axolotl flash-attn structlora-trl".split()
GB = 1e9


def describe(device: str) -> dict:
    versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    packages = {name: versions[name] for name in PACKAGES if name in versions}
    system = {"python": platform.python_version(), "system": platform.platform()}
    found = {"device": device, **system, "packages": packages}
    if device == "cuda":
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found["gpus"] = [f"{p.name}, {p.total_memory / GB:.0f} GB, {p.major}.{p.minor}" for p in gpus]
        found |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return found
