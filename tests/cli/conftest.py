"""Where the command line's tests run."""

from __future__ import annotations

import pytest

from tests.support.data import save_base, texts, write_rows


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a tiny LLaMA in `base` and texts in `data.jsonl`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save_base(tmp_path / "base")
    write_rows(tmp_path / "data.jsonl", texts())
    return tmp_path
