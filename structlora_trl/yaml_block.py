"""The `structlora:` key of a YAML file, read alike by the command line and by every integration."""

from __future__ import annotations

from typing import get_type_hints

from .config import StructLoRAConfig
from .errors import StructLoRAError

_NUMBERS = {name for name, type_ in get_type_hints(StructLoRAConfig).items() if type_ is float}


def read_switch(value: StructLoRAConfig | dict | bool | None) -> StructLoRAConfig | None:
    """What the key asks for.

    Args:
        value (`StructLoRAConfig`, `dict`, `bool` or None): options, `true` (all defaults) or `false` (plain LoRA).

    Returns:
        `StructLoRAConfig`, or None for `false`.

    Raises:
        StructLoRAError: nothing under the key, which may be meant either way; an unknown option, with the nearest known
            one; a value out of range.
    """
    if isinstance(value, bool):
        return StructLoRAConfig() if value else None
    if isinstance(value, dict):
        return StructLoRAConfig.build(read_options(value))
    if isinstance(value, StructLoRAConfig):
        return value
    raise StructLoRAError(
        f"`structlora:` with {'nothing' if value is None else repr(value)} under it",
        "true, false or options",
        "write `structlora: true` for the defaults, `structlora: false` for plain LoRA, or options indented under the key",
    )


def read_options(block: dict) -> dict:
    """The options of a block, numbers as numbers; their values are not looked at, for a command line may add to them.

    Raises:
        StructLoRAError: an unknown option, with the nearest known one.
    """
    StructLoRAConfig.refuse_unknown(block)
    return {name: _number(name, option) for name, option in block.items()}


def _number(name: str, option):
    """PyYAML follows YAML 1.1, in which 1e-2 is text (1.0e-2 is a number)."""
    if name in _NUMBERS and isinstance(option, str):
        try:
            return float(option)
        except ValueError:
            pass
    return option
