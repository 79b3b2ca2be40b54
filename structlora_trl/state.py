"""StructLoRA's own file in a checkpoint: one safetensors file beside the adapter, written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import StructLoRAError
from .runtime import Runtime

logger = logging.getLogger(__name__)

STATE_NAME = "structlora.safetensors"
_FORMAT = "2"


def save_state(runtime: Runtime, directory: str | os.PathLike) -> Path:
    """Write the runtime's state to `directory/structlora.safetensors`, atomically.

    The header holds the configuration, and for each kind its modules and shape [L, r, k, d].

    Raises:
        StructLoRAError: the file cannot be written; what was there before still is.

    Example:
        >>> runtime = attach(model, optimizer)
        >>> save_state(runtime, folder).name
        'structlora.safetensors'
    """
    path = Path(directory) / STATE_NAME
    unfinished = path.with_suffix(".unfinished")
    metadata = {
        "format": _FORMAT,
        "seed": str(runtime.seed),
        "config": json.dumps(runtime.config.options()),
        "kinds": json.dumps({kind.name: {"modules": kind.modules, "shape": kind.shape} for kind in runtime.kinds}),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.cpu() for name, value in runtime.state_dict().items()}, unfinished, metadata)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise StructLoRAError(
            f"that {path} cannot be written ({error})",
            "room and permission for the StructLoRA state",
            "free space or fix permissions, then resume from the last complete checkpoint",
        ) from error
    return path


def load_state(runtime: Runtime, directory: str | os.PathLike) -> None:
    """Go on from the state that `save_state` wrote to `directory`.

    Raises:
        StructLoRAError: no state file, one that is damaged, or one of other modules, shapes or rank.

    Example:
        >>> runtime = attach(model, optimizer)
        >>> _ = save_state(runtime, folder)
        >>> load_state(runtime, folder)
    """
    path = Path(directory) / STATE_NAME
    if not path.is_file():
        raise StructLoRAError(
            f"no {STATE_NAME} in {directory}",
            "a checkpoint that StructLoRA wrote",
            "resume from another checkpoint; or, to start StructLoRA from this adapter's weights, load it with "
            "`PeftModel.from_pretrained(..., is_trainable=True)` and train without `resume_from_checkpoint`",
        )
    state, metadata = read_state(path)
    runtime.load_state_dict(state)
    written, here = metadata["config"], runtime.config.options()
    changed = [f"{name} ({written.get(name)!r} -> {here[name]!r})" for name in here if written.get(name) != here[name]]
    if changed:
        logger.warning("StructLoRA resumes with options that differ from the checkpoint's: %s.", ", ".join(changed))


def read_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a state file, and its header with `config` and `kinds` decoded.

    Raises:
        StructLoRAError: it is damaged or of another format.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise StructLoRAError(
            f"{path} damaged ({error})", "a file that StructLoRA finished writing", "resume from the checkpoint before"
        ) from error
    if metadata.get("format") != _FORMAT:
        raise StructLoRAError(
            f"{path} in format {metadata.get('format')}",
            f"format {_FORMAT}",
            "use the version of structlora-trl that wrote it",
        )
    return state, {**metadata, "config": json.loads(metadata["config"]), "kinds": json.loads(metadata["kinds"])}
