"""The public API's types, as a user's checker sees them."""

from __future__ import annotations

import subprocess
import sys

from tests.support.launching import ROOT


def test_typed_use():
    command = [sys.executable, "-m", "mypy", "--cache-dir", ".mypy_cache", "tests/docs/typed_use.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
