"""The distributions: their metadata, what is in the wheel, that it installs alone, and that each module in it imports."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.launching import ROOT

SOURCES = ("structlora_trl", "integrations", "pyproject.toml", "README.md", "LICENSE")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
# What a front door needs of a trainer that is not installed here, to be imported: its module, and the name taken from it.
STAND_INS = {"axolotl.integrations.base": "BasePlugin", "swift.callbacks": "callbacks_map"}
IMPORTS = f"""
import importlib, json, pkgutil, sys, types
for name, attribute in {STAND_INS!r}.items():
    parts = name.split(".")
    for end in range(len(parts)):
        sys.modules[".".join(parts[: end + 1])] = types.ModuleType(parts[end])
    setattr(sys.modules[name], attribute, type(attribute, (dict,), {{}}) if attribute[0].isupper() else {{}})
import structlora_trl
found = {{}}
for module in pkgutil.walk_packages(structlora_trl.__path__, "structlora_trl."):
    if not module.name.endswith("__main__"):
        found[module.name] = importlib.import_module(module.name).__file__
print(json.dumps(found))
"""


def run(*command, **environment) -> str:
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The folder of sdist and wheel, built from a copy so that the checkout stays as it is; the wheel is built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    run(sys.executable, "-m", "build", "--no-isolation", folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    (built,) = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Path:
    """An environment that holds the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    run(*PIP, "--python", folder / "bin" / "python", "install", "--quiet", "--no-index", "--no-deps", wheel)
    return folder / "bin"


def modules(folder: Path, package: str) -> set[str]:
    """Files of a package in this checkout, as they are named in the wheel."""
    paths = (
        p.relative_to(folder) for p in folder.rglob("*.py") if "tests" not in p.relative_to(folder).parts
    )
    return {f"{package}/{path.as_posix()}" for path in paths}


def test_wheel_holds_the_package_and_no_tests(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    ours = modules(ROOT / "structlora_trl", "structlora_trl")
    doors = modules(ROOT / "integrations", "structlora_trl/integrations")
    assert names == ours | doors | {"structlora_trl/py.typed", "structlora_trl/shrink/page.html.j2"}


def test_distributions_pass_the_checks_of_an_upload(dist):
    run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir())
    (sdist,) = dist.glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    assert {"integrations/axolotl/__init__.py", "structlora_trl/core/mapping.py", "LICENSE"} <= names


def test_what_the_package_imports_is_what_the_wheel_asks_for(wheel):
    (metadata,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    asked = {
        name.lower()
        for name, rest in re.findall(r"^Requires-Dist: ([\w.-]+)(.*)", text, re.M)
        if "extra" not in rest
    }
    imported = set()
    for path in (ROOT / "structlora_trl").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # not those inside functions and `try`
            if isinstance(node, ast.Import):
                imported |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    imported = {{"yaml": "pyyaml"}.get(name, name) for name in imported - sys.stdlib_module_names}
    # Those of the extra `plot` are imported where `inspect` is asked to draw.
    assert imported == asked | {"jinja2", "matplotlib"}


def test_commands_give_help_in_a_bare_environment(bare):
    assert "structlora sft" in run(bare / "structlora", "--help")
    assert "structlora: false" in run(bare / "structlora-llamafactory", "--help")


def test_every_module_imports_from_the_wheel(bare):
    """With the libraries of this environment, and in it the wheel's own files."""
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    found = json.loads(
        run(bare / "python", "-c", IMPORTS, PYTHONPATH=os.pathsep.join(libraries)).splitlines()[-1]
    )
    assert {
        f"structlora_trl.integrations.{door}" for door in ("axolotl", "llamafactory", "ms_swift")
    } <= found.keys()
    assert all(Path(path).is_relative_to(bare.parent) for path in found.values())
