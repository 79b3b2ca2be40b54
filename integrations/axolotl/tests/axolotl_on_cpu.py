"""`axolotl train` in several processes without GPUs, for which its YAML has no keys: it gives each rank a GPU, and Trainer too.

Under torchrun: axolotl_on_cpu.py CONFIG.yaml
"""

import sys

import torch
from accelerate import DistributedType, PartialState
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train

# Built for CUDA and without a GPU, PyTorch raises another error here than Axolotl is ready for.
torch.cuda.can_device_access_peer = lambda *_: False
cfg = load_cfg(sys.argv[1])
cfg.device_map = {"": "cpu"}
if cfg.deepspeed:
    import deepspeed  # noqa: F401

    # Its shared-memory op would be compiled first, for a minute.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    # Without a GPU Accelerate finds no backend for DeepSpeed, and every rank takes itself for the first.
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_CPU)
do_train(cfg, TrainerCliArgs())
