"""What a training run must leave behind: StructLoRA's state, with its parts moved."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from structlora_trl.state import STATE_NAME

LEAST_MOVE = 1e-3  # of a gate logit in three steps at the default rate of 0.03


def state_of(folder) -> tuple[dict, dict[str, torch.Tensor]]:
    """Header and tensors of the state in a folder."""
    with safe_open(Path(folder) / STATE_NAME, "pt") as file:
        header = {name: json.loads(text) for name, text in file.metadata().items()}
        return header, {key: file.get_tensor(key) for key in file.keys()}


def assert_acted(folder, steps: int = 3) -> tuple[dict, dict[str, torch.Tensor]]:
    """Options and tensors of the state in a folder: every gate has moved, and the coordinator where there is one."""
    header, state = state_of(folder)
    options = header["options"]
    assert header["step"] == steps
    start = torch.tensor(options["gate_init"]).logit()
    logits, thetas = ([v for k, v in state.items() if k.endswith(end)] for end in ("logits", ".theta"))
    assert logits and all((values - start).abs().min() > LEAST_MOVE for values in logits)
    assert bool(thetas) == (options["coordinator"] != "none") and all(theta.any() for theta in thetas)
    return options, state
