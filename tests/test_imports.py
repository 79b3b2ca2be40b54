"""What importing a part of the package brings with it: the core needs PyTorch alone, and help needs nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.launching import ROOT

LIBRARIES = {"accelerate", "datasets", "deepspeed", "matplotlib", "peft", "torch", "transformers", "trl"}
TORCH, PEFT = {"torch"}, {"torch", "transformers", "accelerate", "peft"}
ALLOWED = {
    "structlora_trl": set(),
    "structlora_trl.config": set(),
    "structlora_trl.cli": set(),
    "structlora_trl.core.mapping": TORCH,
    "structlora_trl.core.diagnostics": TORCH,
    "structlora_trl.attachment": PEFT,
    "structlora_trl.trainers.callback": PEFT | {"datasets"},  # which transformers' Trainer imports
}


@pytest.mark.parametrize("module", ALLOWED)
def test_modules_import_what_they_need_and_no_more(module):
    code = f"import json, sys, {module}; print(json.dumps([n for n in {sorted(LIBRARIES)} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert set(json.loads(done.stdout.splitlines()[-1])) <= ALLOWED[module]
