"""`structlora inspect`: what it says, against figures worked out from the files alone."""

from __future__ import annotations

import json
import math
import resource
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from structlora_trl.cli import main
from structlora_trl.shrink.base_model import write_adapter
from structlora_trl.shrink.inspecting import final_losses, log_history, report
from structlora_trl.shrink.load_adapter import read_saved
from structlora_trl.shrink.pruning import prune
from structlora_trl.state import STATE_NAME
from tests.support.adapters import (
    DEPTHS,
    EXPERTS,
    HALF,
    KINDS,
    RANK,
    STEPS,
    as_it_is,
    bare_run,
    on_base,
    only_adapter,
)
from tests.support.tiny import FAMILIES, base_model, logits_of

pytest.importorskip("jinja2")
imread = pytest.importorskip("matplotlib.image").imread


def inspected(capsys, *arguments) -> dict:
    capsys.readouterr()
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """NaN where an update is zero."""
    return float(torch.cosine_similarity(a, b, 0)) if a.any() and b.any() else math.nan


def _means(cosines: list[float]) -> list[float | None]:
    """Of three depths, each with its neighbours."""
    means = torch.tensor([cosines[0], float(torch.tensor(cosines).nanmean()), cosines[1]])
    return [None if math.isnan(mean) else mean for mean in means.tolist()]


@pytest.mark.parametrize("variant", ["plain", "rslora"])
def test_inspect_tells_what_the_files_hold(variant, runs, capsys):
    out = runs(variant)
    facts = inspected(capsys, out)
    state = load_file(out / STATE_NAME)
    assert facts["step"] == STEPS and [kind["name"] for kind in facts["kinds"]] == KINDS
    model = on_base(out, out.parent / "base").get_base_model()
    for kind in facts["kinds"]:
        leaf = kind["name"].split(".")[-1]
        side = "B" if leaf == "o_proj" else "A"
        assert kind["role"] == {"A": "read", "B": "write"}[side]
        layers = [getattr(layer.self_attn, leaf) for layer in model.model.layers]
        updates = [layer.get_delta_weight("default") for layer in layers]
        origin = state[f"{kind['name']}/origin_A"][0] if side == "A" else 0
        assert [row["layer"] for row in kind["depths"]] == ["0", "1", "2"]
        for row, update, kept in zip(
            kind["depths"], updates, state[f"{kind['name']}/selection.kept"], strict=True
        ):
            assert row["kept"] == int(kept.sum())
            assert row["norm"] == pytest.approx(update.norm().item(), rel=1e-4)
            share = torch.linalg.svdvals(update)[:RANK] / torch.linalg.svdvals(update).sum()
            assert row["effective_rank"] == pytest.approx(
                (-torch.xlogy(share, share).sum()).exp().nan_to_num(0).item(), abs=1e-2
            )
        # What the side on the residual stream has added, the stream's axis last.
        parts = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in layers]
        learned = [B @ (A - origin) if side == "A" else (B @ A).T for A, B in parts]
        squares = [(update.T @ update).flatten() for update in learned]
        cosines = [[_cosine(a, b) for b in squares] for a in squares]
        for found, expected in zip(kind["similarity"], cosines, strict=True):
            assert [math.nan if x is None else x for x in found] == pytest.approx(
                expected, abs=1e-4, nan_ok=True
            )
        similarity = [row["similarity"] for row in kind["depths"]]
        assert similarity == pytest.approx(_means([cosines[0][1], cosines[1][2]]), abs=1e-4)
        assert [row["semantic"] for row in kind["depths"]] == [
            joined.nonzero().flatten().tolist() for joined in state[f"{kind['name']}/graph.semantic"][0]
        ]
        values = [torch.linalg.svdvals(update)[:RANK] for update in updates]
        assert kind["singular_values"][2] == pytest.approx(values[2].tolist(), abs=1e-5)


def rows_of(printed: str) -> list[dict[str, str]]:
    """The rows of the printed table, by column."""
    lines = printed.splitlines()
    (head,) = (number for number, line in enumerate(lines) if line.split()[:2] == ["rank", "kept"])
    columns = ["module", *lines[head].split()]
    return [dict(zip(columns, line.split(), strict=True)) for line in lines[head + 1 :] if line]


def test_inspect_prints_a_row_for_each_module(runs, plain_adapter, capsys):
    whole = {kind["name"]: kind for kind in inspected(capsys, runs())["kinds"]}
    modules = {depth["module"] for kind in whole.values() for depth in kind["depths"]}
    for folder, is_cut in ((runs(), True), (runs() / f"checkpoint-{HALF}", False), (plain_adapter, True)):
        assert main(["inspect", str(folder)]) == 0
        rows = rows_of(capsys.readouterr().out)
        assert {row["module"] for row in rows} == modules and {row["rank"] for row in rows} == {str(RANK)}
        assert (sum(int(row["kept"]) for row in rows) < RANK * len(rows)) is is_cut
        assert ("nats" in rows[0]) is ("semantic" in rows[0]) is (folder != plain_adapter)
    facts = inspected(capsys, plain_adapter)
    assert facts["step"] is None and facts["options"] is None
    for kind in facts["kinds"]:
        for row, known in zip(kind["depths"], whole[kind["name"]]["depths"], strict=True):
            assert row["kept"] == known["kept"] and row["semantic"] is None
            # Without the state, A's origin is unknown; B began at zero.
            assert row["similarity"] == (
                pytest.approx(known["similarity"], abs=1e-4) if kind["role"] == "write" else None
            )
            assert row["norm"] == pytest.approx(known["norm"], rel=1e-4)


def test_another_adapter_is_shown_beside_the_first(runs, tmp_path, capsys):
    """Modules that the other one lacks show as '-'."""
    small = str(tmp_path / "small")
    assert main(["export", str(runs()), small, "--keep", "0.25", "--data", "none"]) == 0
    ranks = {d["module"]: d["rank"] for kind in inspected(capsys, small)["kinds"] for d in kind["depths"]}
    assert main(["inspect", str(runs()), "--against", small]) == 0
    printed = capsys.readouterr().out
    assert f"{small}: a LoRA adapter" in printed
    for row in rows_of(printed):
        beside = row["rank_against"]
        assert row["rank"] == str(RANK) and (
            float(beside) == ranks[row["module"]] if row["module"] in ranks else beside == "-"
        )


def test_inspect_writes_figures(runs, plain_adapter, tmp_path, capsys):
    for folder, charts in (
        (runs(), ["nats", "training", "size", "norm", "similarity"]),
        (plain_adapter, ["size", "norm", "similarity"]),
    ):
        out = tmp_path / f"figures of {folder.name}"
        assert main(["inspect", str(folder), "--plot", str(out)]) == 0
        assert f"Wrote {', '.join(charts)} to {out}." in capsys.readouterr().out
        written = {path.name for path in out.iterdir()}
        assert written == {f"{name}.{kind}" for name in charts for kind in ("png", "pdf")}
        for path in out.glob("*.png"):
            assert imread(path).std() > 0.01, f"{path.name} is blank"


@pytest.mark.parametrize(
    "library, module, option", [("matplotlib", "figures", "--plot"), ("jinja2", "page", "--html")]
)
def test_a_missing_library_is_named(library, module, option, runs, tmp_path, monkeypatch, capsys):
    run = str(runs())  # before the library is gone: TRL's model card needs jinja2
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"structlora_trl.shrink.{module}", raising=False)
    assert main(["inspect", run, option, str(tmp_path / "figures")]) == 1
    assert "structlora-trl[plot]" in capsys.readouterr().err


# What is to be written -> words of the message about what stands there already.
IN_THE_WAY = {
    "--plot notes.txt": "a file notes.txt, where a folder is to be written",
    "--html pages": "a folder pages, where a file is to be written",
    "--html notes.txt/a/page.html": "a file notes.txt, above notes.txt/a",
}


@pytest.mark.parametrize("given", IN_THE_WAY)
def test_what_stands_in_the_way_is_named_before_the_work(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pages").mkdir()
    (tmp_path / "notes.txt").write_text("kept")
    (tmp_path / "adapter_config.json").write_text("no adapter")  # which nothing reads before that
    assert main(["inspect", str(tmp_path), *given.split()]) == 1
    assert IN_THE_WAY[given] in capsys.readouterr().err and (tmp_path / "notes.txt").read_text() == "kept"


@pytest.mark.parametrize("given", ["--html page.html", "--plot figures"])
def test_a_disk_without_room_keeps_what_was_there(given, plain_adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.html").write_text("the page before")
    there, limits = sorted(tmp_path.rglob("*")), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        assert main(["inspect", str(plain_adapter), *given.split()]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == there
    assert (tmp_path / "page.html").read_text() == "the page before"


def test_inspect_begins_with_a_summary(runs, capsys):
    depths = [depth for kind in inspected(capsys, runs())["kinds"] for depth in kind["depths"]]
    ranks = [depth["effective_rank"] for depth in depths if depth["kept"]]
    kept, loss = sum(depth["kept"] for depth in depths), final_losses(log_history(runs()))[0]
    assert main(["inspect", str(runs())]) == 0
    assert capsys.readouterr().out.splitlines()[1] == (
        f"{RANK * len(depths)} directions in {len(depths)} modules, mean effective rank {sum(ranks) / len(ranks):.2f}; "
        f"{kept} of the directions add something; training loss {loss:.4g}."
    )
    assert len(ranks) < len(depths) == len(KINDS) * DEPTHS


@pytest.mark.parametrize(
    "scales",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"experts.down_proj": 3, "experts.gate_up_proj": 3}}],
)
def test_experts_are_told_apart(scales, tmp_path):
    """With the state, kinds are named by the parameter; without it, the file does not say which wrapper is whose."""
    base = as_it_is("mixtral")(tmp_path / "base")
    out = bare_run(base, tmp_path / "out", FAMILIES["llama"].batch, target_modules=[], **EXPERTS, **scales)
    only_adapter(out, tmp_path / "plain")
    outer = [layer.mlp.experts for layer in on_base(out, tmp_path / "base").get_base_model().model.layers]
    wrappers = {"": outer, "base_layer": [wrapper.base_layer for wrapper in outer]}
    named = {wrappers[place][0].parameter_name: wrappers[place] for place in wrappers}
    for folder, expected in ((tmp_path / "plain", wrappers), (out, named)):
        kinds = {kind.name: kind for kind in report(read_saved(folder))}
        assert len(kinds) == 2 * 4
        for name, layers in expected.items():
            for expert in range(4):
                kind = kinds[f"model.layers.*.mlp.experts{'.' if name else ''}{name}[{expert}]"]
                assert kind.depths[0].rank == RANK
                for row, layer in zip(kind.depths, layers, strict=True):
                    update = layer.get_delta_weight("default")[expert]
                    values = torch.linalg.svdvals(update)
                    share = values[:RANK] / values.sum()
                    entropy = -torch.xlogy(share, share).sum()
                    assert row.norm == pytest.approx(update.norm().item(), rel=1e-4)
                    assert row.effective_rank == pytest.approx(entropy.exp().nan_to_num(0).item(), abs=1e-2)
                    similarity = row.similarity
                    assert similarity is None or (folder == out and 0 <= similarity <= 1 + 1e-6)


def test_experts_that_are_modules_are_told_apart_and_pruned(tmp_path):
    lora = {"target_modules": ["q_proj", "up_proj", "down_proj"]}
    out = bare_run(base_model("mixture"), tmp_path / "out", FAMILIES["mixture"].batch, **lora)
    only_adapter(out, tmp_path / "plain")

    def loaded(folder):
        return PeftModel.from_pretrained(base_model("mixture"), folder).eval()

    layers = loaded(out).get_base_model().model.layers
    for folder in (out, tmp_path / "plain"):
        kinds = {kind.name: kind for kind in report(read_saved(folder))}
        experts = [f"mlp.experts.{e}.{leaf}_proj" for e in range(4) for leaf in ("up", "down")]
        assert kinds.keys() == {f"model.layers.*.{name}" for name in ("self_attn.q_proj", *experts)}
        for name in experts:
            kind = kinds[f"model.layers.*.{name}"]
            assert [row.layer.split(".")[0] for row in kind.depths] == ["0", "1", "2"]
            for row, layer in zip(kind.depths, layers, strict=True):
                update = layer.get_submodule(name).get_delta_weight("default")
                assert row.module == f"model.layers.{row.depth}.{name}"
                assert row.norm == pytest.approx(update.norm().item(), rel=1e-4)
    pruned = prune(read_saved(out))
    small = tmp_path / "small"
    write_adapter(small, *pruned.written())
    torch.testing.assert_close(
        logits_of(loaded(small), "mixture"), logits_of(loaded(out), "mixture"), atol=1e-5, rtol=0
    )
    directions = sum(int(kept.sum()) for kept in pruned.kept.values())
    assert 0.3 < directions / (27 * RANK) < 0.7
