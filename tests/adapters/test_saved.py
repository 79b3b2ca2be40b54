"""What `read_saved` finds in a folder: adapters and checkpoints of every engine, and what it refuses."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from structlora_trl.adapters.saved import read_saved
from structlora_trl.cli import main
from structlora_trl.state import STATE_NAME
from tests.support.adapters import ADAPTER, DEPTHS, KINDS
from tests.support.launching import launch, one_at_a_time


def test_an_adapter_of_another_name_lies_in_a_folder_of_its_own(runs, tmp_path):
    shutil.copytree(runs(), tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-*"))
    (tmp_path / "out" / "mine").mkdir()
    for name in (ADAPTER, "adapter_config.json"):
        (tmp_path / "out" / name).rename(tmp_path / "out" / "mine" / name)
    saved = read_saved(tmp_path / "out")
    assert saved.maps is not None
    assert all(torch.equal(value, saved.tensors[name]) for name, value in load_file(runs() / ADAPTER).items())


def test_the_map_is_applied_where_only_latents_are_saved(runs, tmp_path):
    """A checkpoint without adapter weights, and one with fp32 masters beside it as `zero_to_fp32.py` writes them."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(runs() / "checkpoint-6", checkpoint)
    saved = load_file(checkpoint / ADAPTER)
    (checkpoint / ADAPTER).unlink()
    masters = {}
    state = load_file(checkpoint / STATE_NAME)
    for kind in KINDS:
        for depth in range(DEPTHS):
            for side in "AB":
                module = f"base_model.model.{kind.replace('*', str(depth))}"
                masters[f"{module}.lora_{side}.default.weight"] = state[f"{kind}/latent_{side}"][depth].clone()
    (checkpoint / "fp32").mkdir()
    torch.save(masters, checkpoint / "fp32" / "pytorch_model.bin")
    for number, folder in enumerate((checkpoint, checkpoint / "fp32")):
        assert main(["export", str(folder), str(tmp_path / f"adapter{number}")]) == 0
        exported = load_file(tmp_path / f"adapter{number}" / ADAPTER)
        assert exported.keys() == saved.keys()
        for name in saved:
            torch.testing.assert_close(exported[name], saved[name], atol=1e-6, rtol=1e-5)
    assert max((masters[n.replace(".weight", ".default.weight")] - saved[n]).abs().max() for n in saved) > 1e-2


ENGINES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
FAST = "zero3"


@one_at_a_time
@pytest.mark.parametrize("engine", [e if e == FAST else pytest.param(e, marks=pytest.mark.slow) for e in ENGINES])
def test_checkpoints_of_every_engine(engine, tmp_path):
    launch(tmp_path, engine, steps=2, trainer={"save_strategy": "steps", "save_steps": 2}, method={"gate_lr": 1.0})
    (checkpoint,) = tmp_path.glob("checkpoint-2")
    saved = load_file(checkpoint / ADAPTER)
    assert main(["inspect", str(checkpoint)]) == 0
    folders = [checkpoint]
    if engine.startswith("zero"):
        collect = [sys.executable, "zero_to_fp32.py", ".", "fp32"]
        done = subprocess.run(collect, cwd=checkpoint, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        folders.append(checkpoint / "fp32")
    for number, folder in enumerate(folders):
        assert main(["export", str(folder), str(tmp_path / f"exported{number}")]) == 0
        exported = load_file(tmp_path / f"exported{number}" / ADAPTER)
        assert saved.keys() == exported.keys() and all(torch.equal(saved[name], exported[name]) for name in saved)
    (checkpoint / ADAPTER).unlink()  # as ZeRO-3 leaves it where it does not gather weights on saving
    for name, value in read_saved(folders[-1]).tensors.items():
        torch.testing.assert_close(value, saved[name], atol=1e-6, rtol=1e-5)


def _damaged(folder):
    path = folder / STATE_NAME
    path.write_bytes(path.read_bytes()[:500])


def _other_step(folder):
    shutil.copy(folder.parent / "out" / "checkpoint-3" / ADAPTER, folder / ADAPTER)


def _masters_alone(folder):
    state = load_file(folder / STATE_NAME)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    torch.save({name: state[f"{KINDS[0]}/latent_A"][0].clone()}, folder / "pytorch_model.bin")
    (folder / STATE_NAME).unlink()
    (folder / ADAPTER).unlink()


MISTAKES = {
    "a broken configuration": (lambda folder: (folder / "adapter_config.json").write_text("{"), [], "unreadable"),
    "a folder without an adapter": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        [],
        "no adapter_config.json",
    ),
    "a damaged state": (_damaged, [], "damaged"),
    "another step's adapter": (_other_step, [], "different weights"),
    "masters without the state": (_masters_alone, [], "latent factors"),
    "no gates known": (lambda folder: (folder / STATE_NAME).unlink(), ["--prune", "0.1"], "its gates are unknown"),
    "a threshold out of range": (lambda folder: None, ["--prune", "5"], "above 0"),
    "no base": (lambda folder: None, ["--merge", "--base", "missing"], "loading the base model missing failed"),
    "no probe": (lambda folder: None, ["--prune", "0.1", "--probe", "missing"], "reading the probe text failed"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_gets_a_message(mistake, runs, tmp_path, capsys):
    spoil, arguments, words = MISTAKES[mistake]
    shutil.copytree(runs(), tmp_path / "out")
    shutil.copytree(runs(), tmp_path / "folder", ignore=shutil.ignore_patterns("checkpoint-*"))
    spoil(tmp_path / "folder")
    capsys.readouterr()
    assert main(["export", str(tmp_path / "folder"), str(tmp_path / "new"), *arguments]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
