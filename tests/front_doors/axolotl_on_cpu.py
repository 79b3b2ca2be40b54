"""`axolotl train` in several processes without GPUs, for which its YAML has no keys: it gives each rank a GPU, and Trainer too.

Under torchrun: axolotl_on_cpu.py CONFIG.yaml
"""

import sys

from accelerate import PartialState

PartialState(cpu=True)  # before Axolotl and DeepSpeed look for GPUs: else every rank takes itself for the first

from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train
from axolotl.core.builders import HFCausalTrainerBuilder

cfg = load_cfg(sys.argv[1])
cfg.device_map = {"": "cpu"}
if cfg.deepspeed:
    import deepspeed  # noqa: F401

    # Its shared-memory op would be compiled first, for a minute.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    HFCausalTrainerBuilder.hook_pre_create_training_args = lambda self, arguments: {**arguments, "use_cpu": True}
do_train(cfg, TrainerCliArgs())
