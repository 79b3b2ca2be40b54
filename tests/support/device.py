"""Where tests of GPUs run: `STRUCTLORA_DEVICE` is `cuda`, or `cpu` to run them on a CPU; else they are skipped.

Imports nothing, since what it sets must be set before torch is imported.
"""

import os

CHOSEN = os.environ.get("STRUCTLORA_DEVICE")
ON_GPU = CHOSEN == "cuda"
BACKEND = "nccl" if ON_GPU else "gloo"


def hide_gpus() -> None:
    """All other tests run on a CPU, also where there is a GPU."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
