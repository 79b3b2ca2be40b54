"""Gates of a finished adapter: `export` keeps the directions that they hold open, and `inspect` shows them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from structlora_trl.cli import main
from structlora_trl.errors import StructLoRAError
from structlora_trl.gates_file import GATES_NAME, read_openness, write_openness
from structlora_trl.shrink.export import export
from structlora_trl.shrink.load_adapter import read_saved
from structlora_trl.shrink.pruning import size_curve
from structlora_trl.shrink.trial import information_curves
from tests.support.adapters import ADAPTER, DEPTHS, HALF, KINDS, RANK, as_it_is, on_base, peft_run
from tests.support.cli_runs import logits_of
from tests.support.data import texts, write_rows
from tests.support.tiny import FAMILIES, tokenizer

UNGATED = "down_proj"  # whose modules are left out of the file


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of PEFT with gates on all but some of its modules, and its base model beside it; its folder."""
    folder = tmp_path_factory.mktemp("gated")
    model = as_it_is("llama")(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    out = peft_run(
        model, folder / "out", FAMILIES["llama"].batch, target_modules=["q_proj", "v_proj", UNGATED]
    )
    generator = torch.Generator().manual_seed(2)
    modules = [name.partition(".lora_A")[0] for name in load_file(out / ADAPTER) if ".lora_A" in name]
    gated = [module for module in modules if UNGATED not in module]
    write_openness(out, {m: torch.sigmoid(3 * torch.randn(RANK, generator=generator)) for m in gated}, {})
    return out


def nats_of(openness: dict) -> dict[tuple[str, int], float]:
    """Module and direction -> its nats, ½ log(1 + 1/α) with α = 1/p - 1, the most first."""
    found = {
        (m, j): float(torch.log1p(1 / (1 / p - 1)) / 2)
        for m, ps in openness.items()
        for j, p in enumerate(ps.double())
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def kept_by(rule: str, value: str, openness: dict) -> set[tuple[str, int]]:
    nats = nats_of(openness)
    if rule == "--rank":
        return {key for m in openness for key in [k for k in nats if k[0] == m][: int(value)]}
    if not value.endswith("%"):
        return {*[*nats][: round(float(value) * len(nats))]}
    kept, share = set(), float(value[:-1]) / 100
    for key in nats:
        if sum(nats[k] for k in kept) < share * sum(nats.values()):
            kept.add(key)
    return kept


@pytest.mark.parametrize(
    "rule, value", [("--keep", "0.25"), ("--keep", "99%"), ("--keep", "50%"), ("--rank", "2")]
)
def test_open_directions_are_kept_without_data(rule, value, adapter, tmp_path, capsys):
    """In plain PEFT the smaller adapter is the whole one with zeros for the others, in the basis of training."""
    assert main(["export", str(adapter), str(tmp_path / "small"), rule, value, "--data", "none"]) == 0
    printed = capsys.readouterr().out
    assert "of the nats of the gates" in printed
    openness = read_openness(adapter)
    kept = kept_by(rule, value, openness)
    assert 0 < len(kept) < RANK * len(openness)
    zeroed = tmp_path / "zeroed"
    shutil.copytree(adapter, zeroed)
    tensors = load_file(adapter / ADAPTER)
    for module in openness:
        closed = [j for j in range(RANK) if (module, j) not in kept]
        tensors[f"{module}.lora_B.weight"][:, closed] = 0
    if rule == "--rank":  # modules without gates keep their largest singular values
        for name in [name for name in tensors if UNGATED in name and "lora_B" in name]:
            A, B = tensors[name.replace("lora_B", "lora_A")], tensors[name]
            U, s, V = torch.linalg.svd(B @ A, full_matrices=False)
            tensors[name] = (U[:, : int(value)] * s[: int(value)]) @ V[: int(value)] @ torch.linalg.pinv(A)
    save_file(tensors, zeroed / ADAPTER)
    found, expected, whole = (
        logits_of(on_base(folder, adapter.parent / "base"), "llama")
        for folder in (tmp_path / "small", zeroed, adapter)
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - whole).abs().max() > 1e-4 or value == "99%"
    small = load_file(tmp_path / "small" / ADAPTER)
    ungated = DEPTHS * (2 if rule == "--rank" else RANK)
    assert sum(len(x) for name, x in small.items() if "lora_A" in name) == len(kept) + ungated
    assert not (tmp_path / "small" / GATES_NAME).exists()


def test_max_rank_holds_for_modules_without_gates_too(adapter, tmp_path):
    pruned = export(read_saved(adapter), tmp_path / "small", keep=0.9, max_rank=2).pruned
    assert {int(mask.sum()) for mask in pruned.kept.values()} == {2}


@pytest.mark.parametrize("size", [{"keep": 0.25}, {"keep": "90%"}, {"rank": 2}])
def test_with_data_the_rows_choose_as_without_gates(size, adapter, tmp_path):
    write_rows(tmp_path / "rows.jsonl", texts())
    bare = tmp_path / "bare"
    shutil.copytree(adapter, bare, ignore=shutil.ignore_patterns(GATES_NAME))
    for folder, out in ((adapter, "gated"), (bare, "other")):
        export(read_saved(folder), tmp_path / out, data=tmp_path / "rows.jsonl", **size)
    found, expected = (load_file(tmp_path / out / ADAPTER) for out in ("gated", "other"))
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)


def test_openness_is_measured_on_rows_beside_other_orders(adapter):
    rows = [{"input_ids": x[None], "labels": x[None]} for x in FAMILIES["llama"].batch(3)["input_ids"]]
    carried, losses = (curve.orders for curve in information_curves(read_saved(adapter), rows))
    assert "openness" not in carried  # information is of singular directions
    assert losses["openness"][-1] == pytest.approx(losses["most information"][-1])
    assert losses["openness"][0][1] != losses["norm"][0][1]


def test_peft_and_merging_ignore_the_file(adapter, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(adapter, bare, ignore=shutil.ignore_patterns(GATES_NAME))
    found = [logits_of(on_base(folder, adapter.parent / "base"), "llama") for folder in (adapter, bare)]
    assert torch.equal(*found)
    assert main(["export", str(adapter), str(tmp_path / "merged"), "--merge"]) == 0
    merged = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), "llama")
    torch.testing.assert_close(merged, found[0], atol=1e-5, rtol=0)


MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
# Gates that are not this adapter's -> words of the message.
MISFITS = {
    "another rank": ({MODULE: torch.rand(RANK + 1)}, rf"{RANK + 1} gates of '{MODULE}'.*does not have"),
    "another module": ({f"{MODULE}.x": torch.rand(RANK)}, "does not have"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_gates_of_another_adapter_are_refused(name, adapter, tmp_path):
    openness, words = MISFITS[name]
    shutil.copytree(adapter, tmp_path / "out")
    write_openness(tmp_path / "out", openness, {})
    with pytest.raises(StructLoRAError, match=f"{words}.*remove this one"):
        read_saved(tmp_path / "out")


def test_inspect_tells_nats_and_openness_by_module(adapter, capsys):
    openness, nats = read_openness(adapter), nats_of(read_openness(adapter))
    capsys.readouterr()
    assert main(["inspect", str(adapter), "--json"]) == 0
    rows = [row for kind in json.loads(capsys.readouterr().out)["kinds"] for row in kind["depths"]]
    for row in rows:
        p = openness.get(f"base_model.model.{row['module']}")
        if p is None:
            assert row["nats"] is row["openness"] is row["closed"] is None
            continue
        own = [value for (module, _), value in nats.items() if module.endswith(row["module"])]
        assert row["nats"] == pytest.approx(sum(own), rel=1e-5)
        assert row["openness"] == pytest.approx(float(p.mean())) and row["closed"] == int((p < 0.5).sum())
    assert main(["inspect", str(adapter)]) == 0
    printed = capsys.readouterr().out
    closed = sum(row["closed"] or 0 for row in rows)
    assert f"Gates on {len(openness)} modules let {sum(nats.values()):.4g} nats through" in printed
    assert f"{closed} of {RANK * len(openness)} directions closed" in printed
    measure, points = size_curve(read_saved(adapter))
    quarter = sum([*nats.values()][: len(nats) // 4]) / sum(nats.values())
    assert measure == "the nats of the gates" and dict(points)[0.25] == pytest.approx(quarter, rel=1e-5)


def test_a_runs_gates_are_read_beside_it(runs, tmp_path):
    """What selection has closed has openness 0."""
    out = tmp_path / "out"
    shutil.copytree(runs(), out)
    saved = read_saved(out)
    assert len(saved.openness) == DEPTHS * len(KINDS)
    closed = {
        module: load_file(out / ADAPTER)[f"{module}.lora_B.weight"].eq(0).all(0) for module in saved.openness
    }
    assert all(torch.equal(saved.openness[module] == 0, closed[module]) for module in closed)
    assert not any((p == 0).any() for p in read_saved(out / f"checkpoint-{HALF}").openness.values())
