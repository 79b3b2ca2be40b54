"""The file of the gates' openness: what is read is what was written; anything else is refused by name."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from structlora_trl.errors import StructLoRAError
from structlora_trl.gates_file import GATES_NAME, read_openness, write_openness

OPENNESS = {"a.q_proj": torch.tensor([0.0, 0.25, 0.9]), "a.v_proj": torch.rand(2)}


def test_what_is_read_is_what_was_written(tmp_path):
    assert read_openness(tmp_path) is None
    for openness in ({}, OPENNESS):
        path = write_openness(tmp_path / "run", openness, {"examples": 100, "beta": 1.0})
        found = read_openness(tmp_path / "run")
        assert found.keys() == openness.keys() and all(torch.equal(found[m], openness[m]) for m in found)
    assert [*path.parent.iterdir()] == [path]
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"form": "1", "examples": "100", "beta": "1.0"}


# What is wrong -> how to write it, and words of the message.
DAMAGED = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-3]), "failed"),
    "another form": (lambda path: save_file(OPENNESS, path, {"form": "2"}), "form 2"),
    "no metadata": (lambda path: save_file(OPENNESS, path), "form None"),
    "another shape": (lambda path: write_openness(path.parent, {"a.b": torch.rand(2, 2)}, {}), "'a.b'"),
    "NaN": (lambda path: write_openness(path.parent, {"a.b": torch.tensor([torch.nan])}, {}), "'a.b'"),
    "above 1": (lambda path: write_openness(path.parent, {"a.b": torch.tensor([1.5])}, {}), "'a.b'"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_by_name(name, tmp_path):
    damage, words = DAMAGED[name]
    damage(write_openness(tmp_path, OPENNESS, {}))
    with pytest.raises(StructLoRAError, match=f"{GATES_NAME}.*{words}"):
        read_openness(tmp_path)


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    write_openness(tmp_path, OPENNESS, {})

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(StructLoRAError, match=f"{GATES_NAME}.*No space"):
        write_openness(tmp_path, {}, {})
    assert read_openness(tmp_path).keys() == OPENNESS.keys() and len([*tmp_path.iterdir()]) == 1
