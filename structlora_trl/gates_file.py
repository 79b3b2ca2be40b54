"""The openness of each direction, in a file beside the adapter.

`runtime.save_gates` writes it at the end of training. `structlora export` and `structlora inspect` read it; PEFT,
vLLM and merging ignore it. Modules have the names that they have in PEFT's adapter file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import StructLoRAError, refusing
from .tensor_file import write_tensors

GATES_NAME = "structlora_gates.safetensors"
_FORM = "1"  # of the file; a reader of another one refuses it
_REMEDY = "copy it anew from the run, update structlora-trl, or remove it to work without gates"


def write_openness(
    directory: str | os.PathLike, openness: Mapping[str, Tensor], facts: Mapping[str, str | float]
) -> Path:
    """Write the file, whole or not at all.

    Args:
        directory (`str` or `Path`): the adapter's; made where missing.
        openness (`dict[str, Tensor]`): module -> (r,), from 0 (closed) to below 1.
        facts (`dict`): of the run (number of examples, beta), for the file's metadata.

    Raises:
        StructLoRAError: the file cannot be written; what was there before still is.
    """
    path = Path(directory) / GATES_NAME
    tensors = {module: values.detach().float().contiguous() for module, values in openness.items()}
    write_tensors(path, tensors, {"form": _FORM} | {name: str(value) for name, value in facts.items()})
    return path


def read_openness(directory: str | os.PathLike) -> dict[str, Tensor] | None:
    """Return module -> (r,) openness in fp32; None where there is no file.

    Raises:
        StructLoRAError: a damaged file, or one of a newer version of this package.
    """
    path = Path(directory) / GATES_NAME
    if not path.is_file():
        return None
    with refusing(f"reading {path}", "a file of gates", _REMEDY, (SafetensorError,)):
        with safe_open(path, "pt") as file:
            form = (file.metadata() or {}).get("form")
            found = {module: file.get_tensor(module) for module in file.keys()}
    for module, p in found.items():
        # NaN is no openness either. One of 1 would be infinitely many nats.
        if form != _FORM or p.dtype != torch.float32 or p.dim() != 1 or not ((p >= 0) & (p < 1)).all():
            raise StructLoRAError(
                f"{path} of form {form}, with '{module}' of shape {list(p.shape)} and type {p.dtype}",
                f"form {_FORM}, with the openness of each direction, from 0 to below 1",
                _REMEDY,
            )
    return found
