"""Legitimate set-ups, each a row of `tests/support/setups.py`, and what each of them must do."""

from __future__ import annotations

import pytest
import torch

from structlora_trl import StructLoRAError
from structlora_trl.core.graph import DepthGraph
from tests.support.promises import assert_it_acted, keep_promises, skip_without
from tests.support.setups import SETUPS

ROWS = [row for rows in SETUPS.values() for row in rows]


def params(refused: bool):
    return [
        pytest.param(row, id=row.name, marks=[pytest.mark.slow] if row.slow else [])
        for row in ROWS
        if (row.refused is not None) is refused
    ]


@pytest.fixture(autouse=True)
def _graphs_change_within_a_run(monkeypatch):
    monkeypatch.setattr(DepthGraph, "redraw_every", 2)


@pytest.mark.parametrize("row", params(refused=False))
def test_setup(row, tmp_path):
    keep_promises(row, tmp_path)


@pytest.mark.parametrize("row", params(refused=True))
def test_setup_is_refused(row, tmp_path):
    skip_without(row.needs)
    loop = row.loop(row, row.method)
    before = [p.detach().clone() for p in loop.model.parameters()]
    with pytest.raises(StructLoRAError, match=f"(?s)StructLoRA found .*{row.refused}"):
        loop.begin()
    assert all(map(torch.equal, before, loop.model.parameters()))
    if row.remedy is not None:
        assert_it_acted(row.loop.run(row, tmp_path, {**row.method, **row.remedy}))
    row.loop.run(row, tmp_path, None, steps=1)  # plain LoRA, or whatever it is, trains


def test_rows_have_names_of_their_own():
    names = [row.name for row in ROWS]
    assert sorted(names) == sorted(set(names))
