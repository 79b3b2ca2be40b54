from __future__ import annotations

from pathlib import Path

import pytest

from examples.demo import demo_assets

from .forms import write


@pytest.fixture(scope="session")
def base() -> Path:
    return demo_assets.model()


@pytest.fixture(scope="session")
def adapters(base, tmp_path_factory) -> Path:
    """A folder with every adapter and form."""
    folder = tmp_path_factory.mktemp("adapters")
    write(base, folder)
    return folder
