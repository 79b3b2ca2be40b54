"""What importing a part of the package brings with it: the core needs PyTorch alone, and help needs nothing."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support.launching import ROOT

LIBRARIES = {"accelerate", "datasets", "deepspeed", "matplotlib", "peft", "torch", "transformers", "trl"}
TORCH, PEFT = {"torch"}, {"torch", "transformers", "accelerate", "peft"}
ALLOWED = {
    "structlora_trl": set(),
    "structlora_trl.config": set(),
    "structlora_trl.cli": set(),
    "structlora_trl.core.mapping": TORCH,
    "structlora_trl.core.diagnostics": TORCH,
    "structlora_trl.attachment": PEFT,
    "structlora_trl.trainers.callback": PEFT | {"datasets"},  # which transformers' Trainer imports
}


@pytest.mark.parametrize("module", ALLOWED)
def test_modules_import_what_they_need_and_no_more(module):
    code = f"import json, sys, {module}; print(json.dumps([n for n in {sorted(LIBRARIES)} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert set(json.loads(done.stdout.splitlines()[-1])) <= ALLOWED[module]


FOLDERS = ("structlora_trl", "integrations", "benchmarks", "examples", "tests", "docs")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "integrations":
        parts = ("structlora_trl", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Modules of the repository that a file imports while it is imported itself."""
    package = module_name(path).split(".")[: None if path.name == "__init__.py" else -1]
    for node in ast.parse(path.read_text()).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [name if (name := f"{source}.{alias.name}") in modules else source for alias in node.names]
        yield from (name for name in names if name in modules)


def test_no_circle_of_imports_in_the_repository():
    modules = {module_name(path): path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    graph = {name: set(imports(path, modules)) - {name} for name, path in modules.items()}
    assert "benchmarks.quality.settings" in graph["benchmarks.quality.selection"]
    assert "structlora_trl.config" in graph["structlora_trl.core.mapping"]
    list(TopologicalSorter(graph).static_order())  # CycleError where there is one


def rooms() -> list[list[str]]:
    """What each row of CONTRIBUTING.md's table names: a folder ("core/"), a file, and files of that folder."""
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("|---|---|\n")[2].partition("\n\n")[0]
    return [re.findall(r"`([\w./]+)`", row.split("|")[1]) for row in table.splitlines()]


def test_imports_point_down_the_table_of_contributing():
    places = {}
    for row, names in enumerate(rooms()):
        folder = Path(names[0]).parent  # of the files named after the first
        for name in names:
            place = Path(name) if Path(name).parts[0] in FOLDERS or "/" in name else folder / name
            assert (ROOT / place).exists(), name
            places[place] = row

    def row_of(path: Path) -> int:
        inside = path.relative_to(ROOT)
        if inside.parts[0] == "integrations" and "tests" in inside.parts:
            return places[Path("tests")]
        return next(places[place] for place in (inside, *inside.parents) if place in places)

    modules = {module_name(path): path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    del modules["structlora_trl"]  # names what others import, and loads it on first use
    for path in modules.values():
        up = [name for name in imports(path, modules) if row_of(modules[name]) < row_of(path)]
        assert not up, f"{path.relative_to(ROOT)} imports {up}"


def test_table_of_contributing_names_every_file_of_the_core_and_of_the_engines():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = {names[0]: row for names, row in zip(rooms(), page.partition("|---|---|\n")[2].splitlines(), strict=False)}
    for path in (ROOT / "structlora_trl" / "core").glob("[a-z]*.py"):
        assert f"`{path.name}`" in rows["structlora_trl/core/"], path.name
    folders = {f"{path.name}/" for path in ROOT.iterdir() if (path / "__init__.py").exists() or path.name in FOLDERS}
    assert folders - {"structlora_trl/"} <= rows.keys()
