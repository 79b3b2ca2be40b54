"""What importing a part of the package brings with it: the core needs PyTorch alone, and help needs nothing."""

from __future__ import annotations

import ast
import json
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
    code = (
        f"import json, sys, {module}; print(json.dumps([n for n in {sorted(LIBRARIES)} if n in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert set(json.loads(done.stdout.splitlines()[-1])) <= ALLOWED[module]


def test_tools_for_finished_adapters_load_nothing_of_a_run():
    """`shrink/` imports neither the runtime nor an engine, nor does what it imports."""
    code = "import json, sys, structlora_trl.shrink.export; print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    of_a_run = tuple(f"structlora_trl.{name}" for name in ("attachment", "engines", "runtime", "trainers"))
    assert not [name for name in json.loads(done.stdout.splitlines()[-1]) if name.startswith(of_a_run)]


FOLDERS = ("structlora_trl", "integrations", "benchmarks", "examples", "tests", "docs")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "integrations":
        parts = ("structlora_trl", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_of_the_repository() -> dict[str, Path]:
    """Name -> file, without the package's own `__init__`, which names what others import and loads it on first use."""
    found = {module_name(path): path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    del found["structlora_trl"]
    return found


def imports(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Modules of the repository that a file imports, at its top, for types alone, or within a function."""
    package = module_name(path).split(".")[: None if path.name == "__init__.py" else -1]
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = [
                name if (name := f"{source}.{alias.name}") in modules else source for alias in node.names
            ]
        yield from (name for name in names if name in modules)


def test_no_circle_of_imports_in_the_repository():
    modules = modules_of_the_repository()
    graph = {name: set(imports(path, modules)) - {name} for name, path in modules.items()}
    assert "benchmarks.quality.settings" in graph["benchmarks.quality.selection"]
    assert "structlora_trl.config" in graph["structlora_trl.core.mapping"]
    list(TopologicalSorter(graph).static_order())  # CycleError where there is one


# Imports point down this list. A name stands for a module, or for a package and all that is in it.
LAYERS = [
    "docs",
    "tests",
    "benchmarks",
    "examples",
    "structlora_trl.cli",
    "structlora_trl.integrations",
    "structlora_trl.shrink",
    "structlora_trl.trainers",
    "structlora_trl.attachment",
    "structlora_trl.model_card",
    "structlora_trl.peft_adapter",
    "structlora_trl.runtime",
    "structlora_trl.mapped_side",
    "structlora_trl.gating",
    "structlora_trl.state",
    "structlora_trl.engines",
    "structlora_trl.core",
    "structlora_trl.yaml_block",
    "structlora_trl.config",
    "structlora_trl",  # what else stands at its root
]


def test_imports_point_down():
    modules = modules_of_the_repository()

    def layer(name: str) -> int:
        name = "tests" if name.startswith("structlora_trl.integrations.") and ".tests" in name else name
        return next(i for i, above in enumerate(LAYERS) if name == above or name.startswith(f"{above}."))

    for name, path in modules.items():
        up = [other for other in imports(path, modules) if layer(other) < layer(name)]
        assert not up, f"{path.relative_to(ROOT)} imports {up}"
