"""The site builds without a warning, and its reference is whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module

import pytest

import structlora_trl
from tests.support.launching import ROOT

pytestmark = pytest.mark.slow  # `make docs` builds it too

HOST, NAME = "https://github.com", "us/it"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    strict = ["--quiet", "--fail-on-warning", "--keep-going"]
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *strict, ROOT / "docs", out],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "GITHUB_SERVER_URL": HOST, "GITHUB_REPOSITORY": NAME},
    )
    assert built.returncode == 0, built.stderr[-4000:]
    return out


def test_the_notebook_is_shown_with_its_outputs(site):
    page = (site / "notebook.html").read_text()
    assert "cell_output" in page and "sentences to train on" in page


def test_pages_link_to_the_repository_whose_workflow_builds_them(site):
    page, address = (site / "index.html").read_text(), f"{HOST}/{NAME}"
    assert f'href="{address}/"' in page and f'href="{address}/blob/main/docs/index.md' in page


def test_reference_names_everything_public(site):
    anchors = set(re.findall(r'id="(structlora_trl\.[\w.]+)"', (site / "api.html").read_text()))
    public = {f"structlora_trl.{name}" for name in structlora_trl.__all__ if name != "__version__"}
    documented = "load_adapter inspecting figures page pruning measuring rows export distilling servers"
    for name in documented.split():
        module = import_module(f"structlora_trl.shrink.{name}")
        own = [item for item in vars(module).values() if getattr(item, "__module__", None) == module.__name__]
        public |= {f"{module.__name__}.{item.__name__}" for item in own if not item.__name__.startswith("_")}
    assert not public - anchors
