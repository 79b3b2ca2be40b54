import json
import os

# Tests never ask a hub, and each worker keeps to one thread unless the environment says otherwise (`make test-portable`).
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support.device import CHOSEN, ON_GPU

if not ON_GPU:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
transformers.logging.set_verbosity_error()


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and CHOSEN is None:
        pytest.skip("for a GPU, or on a CPU as a rehearsal: `make gpu`")


@pytest.fixture(scope="session")
def one_process(tmp_path_factory):
    """A run of `support/distributed_job.py` in one process, by its options; the same options run once."""
    from tests.support.launching import launch

    finished = {}

    def run(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in finished:
            finished[key] = tmp_path_factory.mktemp("one")
            launch(finished[key], **options)
        return finished[key]

    return run


@pytest.fixture(autouse=True)
def _fresh():
    """Each test starts from one seed, and without what a Trainer of another test left in Accelerate's shared state."""
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
