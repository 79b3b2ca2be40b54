"""The demo: what it says before it starts, and what it measures."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from structlora_trl import StructLoRACallback
from structlora_trl.shrink.inspecting import final_losses, log_history
from tests.support.data import save_base
from tests.support.launching import ROOT
from tests.support.tiny import sentence


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


def test_report_and_page_tell_one_measure_and_no_path(demo, tmp_path, monkeypatch):
    """Both runs, on a tiny model: the held-out loss of the table is that of the page, under one name."""
    task, training, report = demo("demo_task"), demo("demo_train"), demo("demo_report")
    monkeypatch.chdir(tmp_path)
    out = Path("demo-output")
    out.mkdir()
    monkeypatch.setattr(task, "MODEL", save_base(tmp_path / "a-model"))
    monkeypatch.setitem(training.RECIPE, "steps", 2)
    examples = [(sentence(index), index % 2) for index in range(8)]
    results = {"base": {**task.evaluate(*task.load_base(), examples), "peak_memory": 0}}
    for name, callbacks in (("lora", []), ("structlora", [StructLoRACallback()])):
        found = training.train(*task.load_base(), examples, examples, 0, out / name, callbacks)
        results[name] = {**found, "peak_memory": 0}
    report.write_report(results, 0, out)
    report.write_page(out)
    table, page = ((out / name).read_text() for name in (report.REPORT, report.PAGE))
    assert report.MEASURE in table and report.MEASURE in page.lower()
    for name in ("lora", "structlora"):
        assert f"{results[name]['nll']:.3f}" in table
        assert final_losses(log_history(out / name))[1] == pytest.approx(results[name]["nll"])
    assert "a-model" in page and str(tmp_path) not in page + table
