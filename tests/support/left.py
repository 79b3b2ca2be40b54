"""What a training run must leave behind: StructLoRA's state, with its parts moved; and how its files come to be damaged."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from structlora_trl.state import STATE_NAME


def state_of(folder) -> tuple[dict, dict[str, torch.Tensor]]:
    """Header and tensors of the state in a folder."""
    with safe_open(Path(folder) / STATE_NAME, "pt") as file:
        header = {name: json.loads(text) for name, text in file.metadata().items()}
        return header, {key: file.get_tensor(key) for key in file.keys()}


def assert_acted(folder, steps: int = 3) -> tuple[dict, dict[str, torch.Tensor]]:
    """Options and tensors of the state in a folder: directions have moved, and the coordinator where there is one."""
    header, state = state_of(folder)
    assert header["step"] == steps
    norms, thetas = ([v for k, v in state.items() if k.endswith(end)] for end in ("/norms", ".theta"))
    assert norms and all(x.all() for x in norms)  # of lora_B, which starts at zero
    assert bool(thetas) == (header["options"]["coordinator"] != "none") and all(
        theta.any() for theta in thetas
    )
    return header["options"], state
