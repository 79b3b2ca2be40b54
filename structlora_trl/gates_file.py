"""The openness of each direction, in a file beside the adapter.

`state.save_gates` writes it at the end of training. `structlora export` and `structlora inspect` read it; PEFT,
vLLM and merging ignore it. Modules have the names that they have in PEFT's adapter file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import StructLoRAError, refuse_unwritable

GATES_NAME = "structlora_gates.safetensors"
_FORM = "1"  # of the file; a reader of another one refuses it


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
    refuse_unwritable(path.parent)
    unfinished = path.with_suffix(".unfinished")
    tensors = {module: values.detach().float().cpu().contiguous() for module, values in openness.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished, {"form": _FORM} | {name: str(value) for name, value in facts.items()})
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise StructLoRAError(
            f"that {path} cannot be written ({error})",
            "room on the disk and permission to write",
            "free some space or fix permissions, and save again",
        ) from error
    return path


def read_openness(directory: str | os.PathLike) -> dict[str, Tensor] | None:
    """Return module -> (r,) openness in fp32; None where there is no file.

    Raises:
        StructLoRAError: a damaged file, or one of a newer version of this package.
    """
    path = Path(directory) / GATES_NAME
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            form = (file.metadata() or {}).get("form")
            found = {module: file.get_tensor(module) for module in file.keys()}
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, f"is damaged ({error})") from error
    if form != _FORM:
        raise _unreadable(path, f"has form {form}")
    for module, values in found.items():
        # NaN is no openness either. One of 1 would be infinitely many nats.
        if values.dtype != torch.float32 or values.dim() != 1 or not ((values >= 0) & (values < 1)).all():
            raise _unreadable(path, f"has no openness of '{module}'")
    return found


def _unreadable(path: Path, why: str) -> StructLoRAError:
    return StructLoRAError(
        f"that {path} {why}",
        f"form {_FORM} of the file, with the openness of each direction, from 0 to below 1",
        "copy it anew from the run, update structlora-trl, or remove it to work without gates",
    )
