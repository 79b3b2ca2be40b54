"""Gates of a finished adapter: `export` keeps the directions that they hold open, and `inspect` shows them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
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


def parts_of(folder, openness: dict) -> dict[str, tuple]:
    """Module -> its update, and U and σ of the update in which directions count by openness."""
    tensors, found = load_file(folder / ADAPTER), {}
    for name in (name for name in tensors if "lora_B" in name):
        module = name.partition(".lora_B")[0]
        A, B = tensors[name.replace("lora_B", "lora_A")].double(), tensors[name].double()
        weighted = B * openness[module].double().sqrt() if module in openness else B
        found[module] = (B @ A, *torch.linalg.svd(weighted @ A, full_matrices=False)[:2])
    return found


@pytest.mark.parametrize(
    "rule, value", [("--keep", "0.25"), ("--keep", "99%"), ("--keep", "50%"), ("--rank", "2")]
)
def test_openness_chooses_without_data(rule, value, adapter, tmp_path, capsys):
    """In plain PEFT each module of the smaller adapter is its update on the first singular vectors."""
    assert main(["export", str(adapter), str(tmp_path / "small"), rule, value, "--data", "none"]) == 0
    assert "the updates' squared norm, counted by openness" in capsys.readouterr().out
    assert not (tmp_path / "small" / GATES_NAME).exists()
    parts, small = parts_of(adapter, read_openness(adapter)), load_file(tmp_path / "small" / ADAPTER)
    ranks = {name.partition(".lora_A")[0]: len(x) for name, x in small.items() if "lora_A" in name}
    left = {m: 1 - s.square()[: ranks.get(m, 0)].sum() / s.square().sum() for m, (_, _, s) in parts.items()}
    if rule == "--rank":
        assert ranks == dict.fromkeys(parts, 2)
    elif value.endswith("%"):
        lost = 1 - float(value[:-1]) / 100
        assert all(left[m] <= lost for m in parts)
        one_less = {
            m: 1 - s.square()[: ranks[m] - 1].sum() / s.square().sum() for m, (_, _, s) in parts.items()
        }
        assert all(one_less[m] > lost for m in parts)
    else:
        assert sum(ranks.values()) == round(float(value) * RANK * len(parts))
    scale = PeftConfig.from_pretrained(adapter).lora_alpha / RANK
    kept = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(adapter.parent / "base"), tmp_path / "small"
    )
    for module, (update, U, _) in parts.items():
        if module not in ranks:
            continue
        U = U[:, : ranks[module]]
        found = kept.get_submodule(module).get_delta_weight("default").double()
        torch.testing.assert_close(found, scale * U @ U.mT @ update, atol=1e-5, rtol=1e-4)


def test_max_rank_holds(adapter, tmp_path):
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
    assert dict(losses["openness"])[0.25] != dict(losses["norm"])[0.25]


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


def test_inspect_tells_nats_and_openness_by_module(adapter, tmp_path, capsys):
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
    (_, points), whole = size_curve(read_saved(adapter)), parts_of(adapter, openness)
    kept = export(read_saved(adapter), tmp_path / "small", keep=0.25, data="none").pruned.kept
    energy = {m: s.square() for m, (_, _, s) in whole.items()}
    quarter = sum(energy[m][: mask.sum()].sum() for m, mask in kept.items()) / sum(
        map(torch.sum, energy.values())
    )
    assert dict(points)[0.25] == pytest.approx(quarter.item(), rel=1e-5)


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
