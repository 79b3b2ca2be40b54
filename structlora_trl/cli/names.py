"""Names of arguments: those that nobody knows, and the nearest known ones. Nothing heavy is imported for it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields

from ..config import StructLoRAConfig
from ..errors import StructLoRAError
from .early import read_yaml

PREFIX = "structlora."
USAGE = "structlora {name} --config run.yaml [--any_argument value]"


def hint(name: str, known: Iterable[str]) -> str:
    """The nearest of the known names, in words. Options of ours without their prefix count as misspelt."""
    names = {
        **{option.name: PREFIX + option.name for option in fields(StructLoRAConfig)},
        **{n: n for n in known},
    }
    # lora_rank is lora_r, not local_rank.
    begun = [n for n in names if name.startswith(n) and 2 * len(n) > len(name)]
    spelt = name.replace("-", "_").removeprefix("no_")
    near = [n for n in (spelt,) if n in names] or difflib.get_close_matches(name, names, 1, 0.9)
    near = near or sorted(begun, key=len)[-1:]
    near = near or difflib.get_close_matches(name, names, 1)
    return f" (did you mean `{names[near[0]]}`?)" if near else ""


def read_file(path: str, known: set[str]) -> dict:
    """The keys and values of the YAML file, every key known."""
    options = read_yaml(path)
    for name in options:
        if name not in known:
            raise StructLoRAError(
                f"an unknown key `{name}` in {path}{hint(str(name), known)}",
                "arguments that `--help` lists",
                "correct or remove it",
            )
    if not isinstance(options.get("env") or {}, dict):
        raise StructLoRAError(
            f"env={options['env']!r} in {path}", "`NAME: value` lines under `env:`", "indent them"
        )
    return options
