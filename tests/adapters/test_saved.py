"""`structlora inspect` and `structlora export`: what they say and write, against figures worked out from the files alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from structlora_trl.adapters.saved import read_saved
from structlora_trl.cli import main
from structlora_trl.state import STATE_NAME
from tests.support.cli_runs import SFT, command_line, logits_of, save_base, texts, write_rows
from tests.support.launching import launch, one_at_a_time
from tests.support.tiny import WHOLE

ADAPTER = "adapter_model.safetensors"
KINDS = [f"model.layers.*.self_attn.{leaf}_proj" for leaf in "qvo"]
DEPTHS, RANK = 3, 4
LORA = {"plain": {}, "rslora": {"use_rslora": "true"}, "dora": {"use_dora": "true"}}


def train(folder: Path, **options) -> Path:
    """A run whose gates have moved far apart; its output folder."""
    save_base(folder / "base")
    write_rows(folder / "data.jsonl", texts())
    paths = {"model_name_or_path": str(folder / "base"), "dataset_name": str(folder / "data.jsonl")}
    settings = {
        "output_dir": str(folder / "out"),
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "gate_lr": 2.0,
    }
    assert main(["sft", *command_line({**SFT, **paths, **WHOLE, **settings, **options})]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by LoRA variant, each trained when first asked for."""
    made = {}

    def run(variant: str = "plain") -> Path:
        if variant not in made:
            made[variant] = train(tmp_path_factory.mktemp(variant), **LORA[variant])
        return made[variant]

    return run


@pytest.fixture
def plain_adapter(runs, tmp_path):
    """The same adapter without StructLoRA's state."""
    folder = tmp_path / "plain_adapter"
    shutil.copytree(runs(), folder, ignore=shutil.ignore_patterns("checkpoint-*", STATE_NAME, "trainer_state.json"))
    return folder


def on_base(adapter: Path, base: Path):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def inspected(capsys, *arguments) -> dict:
    capsys.readouterr()
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("variant", ["plain", "rslora"])
def test_inspect_tells_what_the_files_hold(variant, runs, capsys):
    out = runs(variant)
    facts = inspected(capsys, out)
    state = load_file(out / STATE_NAME)
    assert facts["step"] == state["step"] == 6 and [kind["name"] for kind in facts["kinds"]] == KINDS
    model = on_base(out, out.parent / "base").get_base_model()
    for kind in facts["kinds"]:
        leaf = kind["name"].split(".")[-1]
        side = "B" if leaf == "o_proj" else "A"
        assert kind["role"] == {"A": "read", "B": "write"}[side]
        layers = [getattr(layer.self_attn, leaf) for layer in model.model.layers]
        updates = [layer.get_delta_weight("default") for layer in layers]
        origin = state[f"{kind['name']}/origin_A"][0] if side == "A" else 0
        features = [(getattr(layer, f"lora_{side}")["default"].weight - origin).flatten() for layer in layers]
        cosines = [torch.cosine_similarity(a, b, 0) for a, b in pairwise(features)]
        assert [row["layer"] for row in kind["depths"]] == ["0", "1", "2"]
        for row, update, gates in zip(kind["depths"], updates, state[f"{kind['name']}/filter.logits"].sigmoid()):
            assert row["gates"] == pytest.approx(gates.tolist())
            assert row["norm"] == pytest.approx(update.norm().item(), rel=1e-4)
            share = torch.linalg.svdvals(update)[:RANK] / torch.linalg.svdvals(update).sum()
            assert row["effective_rank"] == pytest.approx((-torch.xlogy(share, share).sum()).exp().item(), rel=1e-3)
        coherence = [row["coherence"] for row in kind["depths"]]
        expected = [cosines[0], sum(cosines) / 2, cosines[1]]
        assert coherence == pytest.approx([float(value) for value in expected], abs=1e-4)
        assert [row["semantic"] for row in kind["depths"]] == [
            joined.nonzero().flatten().tolist() for joined in state[f"{kind['name']}/graph.semantic"]
        ]
        energy = [torch.linalg.svdvals(update)[:RANK].square() for update in updates]
        assert kind["coverage"][0] == pytest.approx((energy[0].cumsum(0) / energy[0].sum()).tolist(), rel=1e-3)


def test_inspect_prints_a_row_for_each_module(runs, plain_adapter, capsys):
    for folder, open_ in ((runs(), f"/{RANK}"), (runs() / "checkpoint-3", f"/{RANK}"), (plain_adapter, "-")):
        assert main(["inspect", str(folder)]) == 0
        lines = capsys.readouterr().out.splitlines()
        rows = [line.split() for line in lines if line[:5].strip().isdigit()]
        assert len(rows) == len(KINDS) * DEPTHS and all(row[1].endswith(open_) for row in rows)
    facts = inspected(capsys, plain_adapter)
    assert facts["step"] is None and facts["options"] is None
    whole = {kind["name"]: kind for kind in inspected(capsys, runs())["kinds"]}
    for kind in facts["kinds"]:
        for row, known in zip(kind["depths"], whole[kind["name"]]["depths"]):
            assert row["gates"] is None and row["semantic"] is None
            # Without the state, A's origin is unknown; B began at zero.
            assert row["coherence"] == (pytest.approx(known["coherence"]) if kind["role"] == "write" else None)
            assert row["norm"] == pytest.approx(known["norm"], rel=1e-4)


def test_inspect_writes_figures(runs, plain_adapter, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    assert main(["inspect", str(runs()), "--plot", str(tmp_path / "figures")]) == 0
    written = {path.name for path in (tmp_path / "figures").iterdir()}
    assert written == {
        f"{name}.{kind}" for name in ("gates", "similarity", "coverage", "drift") for kind in ("png", "pdf")
    }
    for path in (tmp_path / "figures").glob("*.png"):
        assert imread(path).std() > 0.01, f"{path.name} is blank"
    assert main(["inspect", str(plain_adapter), "--plot", str(tmp_path / "few")]) == 0
    assert "No gate map" in capsys.readouterr().out
    assert {path.stem for path in (tmp_path / "few").iterdir()} == {"similarity", "coverage"}


def test_no_matplotlib(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "structlora_trl.adapters.plots", raising=False)
    monkeypatch.delattr("structlora_trl.adapters.plots", raising=False)
    assert main(["inspect", str(runs()), "--plot", str(tmp_path / "figures")]) == 1
    assert 'pip install "structlora-trl[plot]"' in capsys.readouterr().err


@pytest.mark.parametrize("variant", LORA)
@pytest.mark.parametrize("source", ["output", "checkpoint"])
def test_export_is_the_adapter_that_was_saved(variant, source, runs, tmp_path):
    folder = runs(variant) if source == "output" else runs(variant) / "checkpoint-6"
    assert main(["export", str(folder), str(tmp_path / "adapter")]) == 0
    saved, exported = load_file(folder / ADAPTER), load_file(tmp_path / "adapter" / ADAPTER)
    assert saved.keys() == exported.keys() and all(torch.equal(saved[name], exported[name]) for name in saved)
    base = runs(variant).parent / "base"
    assert torch.equal(*(logits_of(on_base(where, base), "llama") for where in (folder, tmp_path / "adapter")))


def test_an_adapter_of_another_name_lies_in_a_folder_of_its_own(runs, tmp_path):
    shutil.copytree(runs(), tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-*"))
    (tmp_path / "out" / "mine").mkdir()
    for name in (ADAPTER, "adapter_config.json"):
        (tmp_path / "out" / name).rename(tmp_path / "out" / "mine" / name)
    saved = read_saved(tmp_path / "out")
    assert saved.maps is not None
    assert all(torch.equal(value, saved.tensors[name]) for name, value in load_file(runs() / ADAPTER).items())


def close_directions(state: dict, adapter: dict, threshold: float) -> int:
    """Zero the closed columns of lora_B; how many."""
    closed = 0
    for kind in KINDS:
        for depth, gates in enumerate(state[f"{kind}/filter.logits"].sigmoid()):
            weight = adapter[f"base_model.model.{kind.replace('*', str(depth))}.lora_B.weight"]
            weight[:, gates < threshold] = 0
            closed += int((gates < threshold).sum())
    return closed


@pytest.mark.parametrize("variant", ["plain", "rslora"])
def test_prune_drops_closed_directions_and_nothing_else(variant, runs, tmp_path, capsys):
    out = runs(variant)
    base, state = out.parent / "base", load_file(out / STATE_NAME)
    gates = torch.cat([state[f"{kind}/filter.logits"].sigmoid() for kind in KINDS])
    threshold = float(gates.amax(1).min())  # the largest that leaves every module a direction
    shutil.copytree(out, tmp_path / "masked", ignore=shutil.ignore_patterns("checkpoint-*"))
    masked = load_file(out / ADAPTER)
    closed = close_directions(state, masked, threshold)
    assert 0 < closed < gates.numel()
    save_file(masked, tmp_path / "masked" / ADAPTER, {"format": "pt"})
    capsys.readouterr()
    assert main(["export", str(out), str(tmp_path / "small"), "--prune", str(threshold)]) == 0
    printed = capsys.readouterr().out

    small = load_file(tmp_path / "small" / ADAPTER)
    assert sum(len(value) for name, value in small.items() if "lora_A" in name) == gates.numel() - closed
    assert (tmp_path / "small" / ADAPTER).stat().st_size < (out / ADAPTER).stat().st_size
    model = on_base(tmp_path / "small", base)
    before, expected, after = (
        logits_of(m, "llama") for m in (on_base(out, base), on_base(tmp_path / "masked", base), model)
    )
    torch.testing.assert_close(after, expected, atol=1e-6, rtol=0)
    assert not torch.allclose(after, before, atol=1e-4)
    directions = next(line.split() for line in printed.splitlines() if line.startswith("directions "))
    assert directions[1:3] == [str(gates.numel()), str(gates.numel() - closed)]
    assert "Output change on 4 x 64 random tokens" in printed


def test_prune_measures_on_a_text_and_spares_one_direction(runs, tmp_path, capsys):
    (tmp_path / "probe.txt").write_text("w1 w2 w3 w4 w5")
    given = [str(runs()), str(tmp_path / "one"), "--prune", "1", "--probe", str(tmp_path / "probe.txt")]
    assert main(["export", *given]) == 0
    printed = capsys.readouterr().out
    assert "1 x 5 tokens" in printed and f"{len(KINDS) * DEPTHS} modules are wholly closed" in printed
    weights = load_file(tmp_path / "one" / ADAPTER)
    assert {len(value) for name, value in weights.items() if "lora_A" in name} == {1}
    state = load_file(runs() / STATE_NAME)
    kept = int(state[f"{KINDS[0]}/filter.logits"][0].argmax())
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(weights[name][0], load_file(runs() / ADAPTER)[name][kept])


def test_merge(runs, plain_adapter, tmp_path):
    base = runs().parent / "base"
    for number, folder in enumerate((runs(), plain_adapter)):
        merged = tmp_path / f"merged{number}"
        assert main(["export", str(folder), str(merged), "--merge"]) == 0
        model = AutoModelForCausalLM.from_pretrained(merged)
        torch.testing.assert_close(
            logits_of(model, "llama"), logits_of(on_base(folder, base), "llama"), atol=1e-6, rtol=0
        )
        assert (merged / "tokenizer_config.json").is_file()


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


def test_an_output_folder_that_is_not_empty(runs, capsys):
    assert main(["export", str(runs()), str(runs())]) == 1
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, words",
    [
        ({"filter": "random"}, "learns no gates"),
        ({"filter": "topk_norm", "gate_init": 0.5, "coordinator": "none"}, None),
    ],
)
def test_prune_goes_by_the_filter(option, words, tmp_path, capsys):
    out = train(tmp_path, **option)
    capsys.readouterr()
    code = main(["export", str(out), str(tmp_path / "small"), "--prune", "0.5"])
    captured = capsys.readouterr()
    if words:
        assert code == 1 and words in captured.err
    else:  # closed directions are exactly zero at evaluation: nothing changes
        assert code == 0 and "largest |Δlogit| 0," in captured.out and " 50.0%" in captured.out


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
