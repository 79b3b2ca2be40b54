"""The table of coherence over depth, on a tiny model in the place of SmolLM2."""

from __future__ import annotations

import sys

from benchmarks.quality import assets, coherence, language
from tests.support.data import save_base
from tests.support.tiny import LAYERS


def test_the_table_has_a_row_for_each_kind(tmp_path, monkeypatch, capsys):
    save_base(tmp_path)
    monkeypatch.setattr(assets, "smollm", lambda: tmp_path)
    pool = [(f"w{i} w{i + 1}", f" w{i % 2}") for i in range(40)]
    monkeypatch.setattr(language.LANGUAGE_TASKS["smollm-movie"], "load", lambda: (pool, [], []))
    monkeypatch.setattr(coherence, "FAR", LAYERS - 1)
    monkeypatch.setattr(sys, "argv", ["coherence", "--steps", "3", "--examples", "16", "--rank", "2"])
    coherence.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "_proj |" in line]
    assert [row[0].strip() for row in rows] == [*coherence.MODULES]
    assert all(0 <= float(cell) <= 1 for row in rows for cell in row[1:])
