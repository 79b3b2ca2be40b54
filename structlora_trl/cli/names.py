"""Names of arguments: those that nobody knows, and the nearest known ones. Nothing heavy is imported for it."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from ..config import StructLoRAConfig
from ..errors import StructLoRAError
from .early import read_yaml

PREFIX = "structlora."
USAGE = "structlora {name} --config run.yaml [--any_argument value]"
# Where arguments are defined: fields of dataclasses, and of Accelerate's launcher.
_SOURCES = (
    ("trl", "scripts/*.py"),
    ("trl", "trainer/*_config.py"),
    ("transformers", "training_args.py"),
    ("accelerate", "commands/launch.py"),
)
_NAME = re.compile(r'(?:^    |"--)(\w+)(?=: |")', re.MULTILINE)


def refuse_misspelt(name: str, arguments: list[str]) -> None:
    """Stop at a name that is nearly one of the libraries', before they are imported; `arguments.parse` stops at all others.

    Raises:
        StructLoRAError: such a key in the YAML file.
        SystemExit: such a name on the command line.
    """
    known = _names_in_source()

    def is_misspelt(word: str) -> bool:
        plain = word.replace("-", "_").removeprefix("no_")
        return plain not in known and bool(difflib.get_close_matches(plain, known, 1, 0.9))

    parser = argparse.ArgumentParser(
        f"structlora {name}", USAGE.format(name=name), add_help=False, allow_abbrev=False
    )
    parser.add_argument("--config")
    given, words = parser.parse_known_args(arguments)
    for flag in (word.split("=")[0] for word in words):
        if flag.startswith("--") and is_misspelt(flag[2:]):
            parser.error(f"unknown argument {flag}{hint(flag[2:], known)}")
    if given.config is not None:
        read_file(given.config, known, is_misspelt)


def _names_in_source() -> set[str]:
    """Names of arguments as they stand in the source of TRL and of what it builds on."""
    found = {"structlora", "overwrite", "config", "env", "accelerate_config"}
    found |= {PREFIX + option.name for option in fields(StructLoRAConfig)}
    for package, pattern in _SOURCES:
        spec = find_spec(package)
        for folder in spec.submodule_search_locations if spec else []:
            for path in Path(folder).glob(pattern):
                found |= {*_NAME.findall(path.read_text(encoding="utf-8"))}
    return found


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


def read_file(path: str, known: set[str], is_wrong: Callable[[str], bool] | None = None) -> dict:
    """The keys and values of the YAML file, every key known; with `is_wrong`, none of which it is true."""
    options = read_yaml(path)
    for name in options:
        if is_wrong(str(name)) if is_wrong else name not in known:
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
