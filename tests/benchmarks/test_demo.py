"""The demo: what it says before it starts, and what it measures."""

from __future__ import annotations

import importlib
import time

import pytest

from tests.support.launching import ROOT


@pytest.fixture
def demo(monkeypatch):
    """The demo's modules by name; its scripts import one another as scripts do."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "demo")
    return importlib.import_module


def test_it_names_what_is_to_be_downloaded(demo, tmp_path, monkeypatch):
    assets = demo("demo_assets")
    there, away = tmp_path / "model", tmp_path / "sentences"
    there.mkdir()
    monkeypatch.setattr(assets, "DOWNLOADS", {there: "93 MB", away: "2.5 MB"})
    assert assets.missing() == "sentences (2.5 MB)"
    monkeypatch.setattr(assets, "DOWNLOADS", {there: "93 MB"})
    assert not assets.missing()


def test_two_processes_that_download_at_once_both_get_the_directory(demo, tmp_path):
    assets = demo("demo_assets")
    path = tmp_path / "model"

    def written(finished, scratch):
        finished.mkdir()
        (finished / "weights").write_text("this process's")

    def written_second(finished, scratch):
        assets.cached(path, written, "93 MB")
        written(finished, scratch)

    assert assets.cached(path, written_second, "93 MB") == path
    assert [file.name for file in path.iterdir()] == ["weights"] and [path] == list(tmp_path.iterdir())


def test_a_machine_that_is_busy_with_something_else_makes_no_step_look_slow(demo):
    progress = demo("demo_train").Progress()
    for _ in range(3):
        progress.on_step_end(None, None, None)
        time.sleep(0.3)  # the clock goes on, the process does nothing
    assert progress.cpu_seconds_per_step() < 0.1
