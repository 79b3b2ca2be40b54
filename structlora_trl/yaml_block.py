"""The `structlora:` key of a YAML file, read alike by the command line and by every integration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import get_type_hints

from .config import StructLoRAConfig
from .errors import StructLoRAError

PREFIX = "structlora."  # of an option that is an argument of a command
_NUMBERS = {
    name for name, type_ in get_type_hints(StructLoRAConfig).items() if type_ in (float, float | None)
}


def read_switch(value: StructLoRAConfig | dict | bool | str | Path | None) -> StructLoRAConfig | None:
    """Read the value of a `structlora` key, as YAML files, command lines and training arguments hold it.

    Args:
        value (`StructLoRAConfig`, `dict`, `bool`, `str` or `Path`): options, True (all defaults) or False
            (plain LoRA); the same as JSON or YAML text; or a YAML or JSON file with a `structlora` key.

    Returns:
        `StructLoRAConfig`, or None for `false`.

    Raises:
        StructLoRAError: nothing under the key, which may be meant either way; an unknown option, with the
            nearest known one; a value out of range; a file that does not exist or has no such key; text that
            is neither.
    """
    if isinstance(value, (str, Path)):
        value = _parsed(value)
    if isinstance(value, bool):
        return StructLoRAConfig() if value else None
    if isinstance(value, Mapping):
        return StructLoRAConfig.build({name: _number(name, option) for name, option in value.items()})
    if isinstance(value, StructLoRAConfig):
        return value
    raise StructLoRAError(
        f"`structlora:` with {'nothing' if value is None else repr(value)} under it",
        "true, false or options",
        "write `structlora: true` for the defaults, `structlora: false` for plain LoRA, or options indented under the key",
    )


def read_over(block: object, options: dict) -> StructLoRAConfig | None:
    """Read the value of a `structlora` key, or the file that it names, with other options over it.

    Args:
        block (`dict`, `bool`, `str` or `Path`): as `read_switch` takes it.
        options (`dict`): by name, as the arguments of a command give them.

    Raises:
        StructLoRAError: options for plain LoRA; or as `read_switch`.
    """
    if not options:
        return read_switch(block)
    below = block if isinstance(block, Mapping) else read_switch(block)
    options = {name.removeprefix(PREFIX): value for name, value in options.items()}
    if below is None:
        raise StructLoRAError(
            f"structlora=false and {', '.join(f'{PREFIX}{name}' for name in options)}",
            "options for a run that trains StructLoRA",
            "remove the options for plain LoRA, or `structlora=false`",
        )
    return read_switch({**(below if isinstance(below, Mapping) else below.changed_options()), **options})


def read_given(
    config: StructLoRAConfig | dict | bool | str | Path | None, taker: str, part: str
) -> StructLoRAConfig | dict | None:
    """Read options as code is given them: a file, text or True as under a `structlora` key, all else as it is.

    Args:
        config (`StructLoRAConfig`, `dict`, `bool`, `str` or `Path`, *optional*): options.
        taker (`str`): what takes them, for the error.
        part (`str`): what to leave out of a program to train plain LoRA, for the error.

    Raises:
        StructLoRAError: it says `false`; or as `read_switch`.
    """
    if not isinstance(config, (str, Path, bool)):
        return config
    found = read_switch(config)
    if found is None:
        raise StructLoRAError(
            f"`structlora: false` in {str(config)!r}, given to {taker}",
            "options, or true for the defaults",
            f"leave {part} out to train plain LoRA",
        )
    return found


def _parsed(text: str | Path) -> object:
    """The value that a file has under `structlora`, or that text stands for."""
    import yaml  # which `--help` of a command has no need of

    try:
        if str(text).endswith((".yaml", ".yml", ".json")):
            document = yaml.safe_load(Path(text).read_text(encoding="utf-8"))
            if not isinstance(document, dict) or "structlora" not in document:
                raise StructLoRAError(
                    f"no `structlora` key in {text}",
                    "its options under that key",
                    "add `structlora: true`, or options",
                )
            return document["structlora"]
        value = yaml.safe_load(text)
    except (OSError, yaml.YAMLError) as error:
        raise StructLoRAError(
            f"{str(text)!r} for `structlora` ({error})",
            "options, true or false as JSON, or a YAML or JSON file with a `structlora` key",
            "correct the text, for example '{\"beta\": 0.5}', or the path",
        ) from error
    if isinstance(value, str):  # plain words are text to YAML
        raise StructLoRAError(
            f"{text!r} for `structlora`",
            "options, true or false as JSON, or a YAML or JSON file with a `structlora` key",
            "write `structlora: true`, options such as '{\"beta\": 0.5}', or a path that ends in .yaml, .yml or .json",
        )
    return value


def _number(name: str, option):
    """PyYAML follows YAML 1.1, in which 1e-2 is text (1.0e-2 is a number), and so is Python's None."""
    if option in ("None", "none") and getattr(StructLoRAConfig(), name, option) is None:
        return None
    if name in _NUMBERS and isinstance(option, str):
        try:
            return float(option)
        except ValueError:
            pass
    return option
