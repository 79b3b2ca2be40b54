"""Writing a safetensors file whole or not at all, for what lies beside an adapter: the state and the gates' openness."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import StructLoRAError, refuse_unwritable


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata to a file; its folder is made if missing.

    Raises:
        StructLoRAError: the file cannot be written; what was there before still is.
    """
    refuse_unwritable(path.parent)
    unfinished = path.with_suffix(".unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: x.cpu() for name, x in tensors.items()}, unfinished, dict(metadata))
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())  # else a machine that stops may keep the new name without its contents
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise StructLoRAError(
            f"that {path} cannot be written ({error})",
            "room on the disk and permission to write",
            "free some space or fix permissions, and save again; a run resumes from its last complete checkpoint",
        ) from error
