"""Where tests of GPUs run: `STRUCTLORA_DEVICE` is `cuda`, or `cpu` to run them on a CPU; else they are skipped.

Imports nothing, since what it sets must be set before torch is imported.
"""

import os
import sys

CHOSEN = os.environ.get("STRUCTLORA_DEVICE")
ON_GPU = CHOSEN == "cuda"
BACKEND = "nccl" if ON_GPU else "gloo"


def without_shm_op() -> None:
    """DeepSpeed, once it is imported, does without collectives in shared memory, which take a minute to compile and are only
    faster.
    """
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def hide_gpus() -> None:
    """All other tests run on a CPU, also where there is a GPU."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
