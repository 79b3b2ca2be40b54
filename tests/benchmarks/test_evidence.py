"""The benchmark suite: what the store holds, what the report may read, and that the defaults are those it was made with."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re

import pandas as pd
import pytest
import torch
from peft.tuners.lora import LoraLayer
from scipy.stats import false_discovery_control
from scipy.stats import t as student
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.quality import (
    assets,
    cell,
    heldout,
    measures,
    methods,
    report,
    run,
    selection,
    settings,
    store,
    tables,
    tasks,
)
from structlora_trl import StructLoRAConfig
from tests.support.tiny import peft_model

LINES = store.read()
RUNS = selection.test_runs(LINES)
FIGURES, MORE_FIGURES = {"accuracy", "nll"}, {"ece", "right"}  # the first of all lines


def test_every_line_is_well_formed_and_its_key_unique():
    assert LINES
    keys = [store.key_of(line) for line in LINES]
    assert len(set(keys)) == len(keys)
    for line in LINES:
        for split in ("validation", "test"):
            assert line[split].keys() - MORE_FIGURES == FIGURES, line
            assert 0 <= line[split]["accuracy"] <= 100 and math.isfinite(line[split]["nll"]), line
        assert line["trained"] > 0 and line["cpu_seconds"] > 0 and line["steps"] > 0, line
    for path in store.RESULTS.glob("*.jsonl"):
        assert {json.loads(text)["task"] for text in path.read_text().splitlines()} == {path.stem}


def test_a_name_means_one_set_of_options():
    for line in LINES:
        stored, now = line["structlora"], methods.find(line["method"]).options()
        if now and now["filter"] == "none":  # `gate_init` acts on nothing, and was once another default
            stored, now = ({**options, "gate_init": None} for options in (stored, now))
        assert stored == now, store.key_of(line)


@pytest.fixture(scope="module")
def written():
    """What the committed files should hold."""
    return report.written(LINES)


def test_defaults_are_those_the_results_were_made_with(written):
    stored = json.loads(report.DEFAULTS.read_text())
    assert stored == json.loads(written[report.DEFAULTS]), "run `make bench-report`"
    now = StructLoRAConfig().options()
    assert {name: now[name] for name in stored["options"]} == stored["options"], (
        "a default changed without its runs"
    )
    assert now.keys() - stored["options"].keys() == methods.UNSET


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.parent.name)
def test_pages_show_what_the_store_gives(written, page):
    assert written[page] == page.read_text(), "run `make bench-report`"


def test_every_p_is_also_corrected_for_the_number_in_its_table(written):
    seen = 0
    for page in report.PAGES:
        for text in re.findall(r"(?:^\|.*\n)+", written[page], re.MULTILINE):
            header, _, *rows = [
                [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
            ]
            columns = [i for i, name in enumerate(header) if re.match(r"p\b", name)]
            assert all(header[i].endswith(" (q, Holm)") for i in columns), header
            cells = [row[i] for row in rows for i in columns if row[i] not in ("", "–")]
            assert all(re.fullmatch(r"(\S+) \((\S+), (\S+)\)", cell) for cell in cells), header
            seen += len(cells)
    assert seen > 500
    found = tables.markdown(["p (q, Holm)"], [[tables.P(p)] for p in (0.01, 0.04, 0.03, math.nan, 0.0002)])
    q = false_discovery_control([0.01, 0.04, 0.03, 0.0002])
    holm = (0.03, 0.06, 0.06)  # 3 x 0.01, then 2 x 0.03 and no less for 0.04
    assert [line.strip("| ") for line in found.splitlines()[2:]] == [
        *(
            f"{p} ({a:.3f}, {b:.3f})"
            for p, a, b in zip(("0.010", "0.040", "0.030"), q[:3], holm, strict=True)
        ),
        "–",
        "<0.001 (<0.001, <0.001)",
    ]


def test_a_few_seeds_on_shared_examples_are_less_certain_than_seeds_alone():
    """The same examples are right in every run: as good as one seed to an error over seeds, not to one over both."""
    ours, theirs = (
        pd.DataFrame({f"{split}.right": [store.packed(right)] * 4 for split in heldout.SPLITS})
        for right in ([True] * 6 + [False] * 4, [True] * 5 + [False] * 5)
    )
    draws = heldout.resampled(ours, theirs, "t")
    assert draws.mean() == pytest.approx(10, abs=0.5)
    assert draws.std() == pytest.approx(100 * (0.1 * 0.9 / 20) ** 0.5, rel=0.1)
    assert heldout.p_of(10.0, draws, 4) == pytest.approx(0.23, abs=0.03)
    figures = {
        f"{split}.{name}": [value]
        for split, value in (("validation", 1.0), ("test", 4.0))
        for name in ("accuracy", "nll", "ece")
    }
    one = pd.DataFrame({**figures, "validation.right": "10:0", "test.right": "20:0"})
    assert heldout.figures(one)["nll"].tolist() == [3.0]


def test_adapters_are_cut_to_their_largest_directions():
    model = peft_model("llama", "warm", rank=4)
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    before = [layer.get_delta_weight("default").detach() for layer in layers]
    assert measures.truncate(model, 2) == len(layers) > 0
    for layer, whole in zip(layers, before, strict=True):
        U, S, V = torch.linalg.svd(whole)
        best = U[:, :2] * S[:2] @ V[:2]
        torch.testing.assert_close(layer.get_delta_weight("default"), best, atol=1e-6, rtol=1e-4)


def test_figures_elsewhere_are_paired_by_seed():
    def line(method, seed, tweets, half):
        figures = {"accuracy": 80.0, "nll": 0.5}
        found = {
            "validation": figures,
            "test": figures,
            "others": {"tweet": {"accuracy": tweets, "nll": 0.5 + seed}},
        }
        if half is not None:
            found["truncated"] = {"half": {"accuracy": half, "nll": 1.0}}
        return {"task": "t", "rank": 4, "examples": 9, "method": method, "lr": 0.1, "seed": seed, **found}

    runs = selection.Runs(
        [
            *(line("lora", seed, 60 + 3 * seed, 70) for seed in range(3)),
            *(line("structlora", seed, 62 + 4 * seed, 71 if seed < 2 else None) for seed in (0, 1, 2, 3)),
        ]
    )
    found = tables.elsewhere(runs, ["structlora"], [(("t", 4, 9), 0.1)], range(4))
    header, _, lora, ours = (
        [part.strip() for part in row.strip("|").split("|")] for row in found.splitlines()
    )
    assert [name for name in header if "accuracy" in name] == ["tweets, accuracy", "half the rank, accuracy"]
    assert lora[3:5] == ["3", "63.0 ± 3.0"] and lora[7:9] == ["3", "70.0 ± 0.0"]
    assert ours[3:5] == ["3", "+3.0 ± 0.6"] and ours[6] == "+0.000" and ours[7:9] == ["2", "+1.0 ± 0.0"]


def test_aims_average_over_settings_each_with_its_own_seeds(monkeypatch):
    """One setting at tuned rates, one place over validation and test examples: their means weigh alike."""

    def line(task, method, lr, seed, accuracy, nll):
        figures = {"accuracy": accuracy, "nll": nll, "ece": 5.0 + (method == "structlora"), "right": "4:0"}
        keys = {"task": task, "rank": 4, "examples": 9, "method": method, "lr": lr, "seed": seed}
        return {**keys, "validation": figures, "test": figures}

    lines = [line("a", "lora", 0.1, seed, 60.0 + seed, 0.5) for seed in range(3)]
    lines += [line("a", "structlora", 0.1, seed, 61.0 + 2 * seed, 0.49) for seed in range(3)]
    kept = [40, 41]
    lines += [line("b", "lora", 0.2, seed, 70.0, 1.0) for seed in kept]
    lines += [line("b", "structlora", 0.2, seed, 69.5 + seed % 2, 1.03) for seed in kept]
    aims = {"all": ([("a", 4, 9)], [(("b", 4, 9), 0.2)]), "never run": ([("a", 4, 9)], [])}
    monkeypatch.setattr(tables, "AIMS", aims)
    rows = tables.aims(selection.Runs(lines), selection.Runs(lines)).splitlines()
    assert len(rows) == 3
    cells = [cell.strip() for cell in rows[2].strip("|").split("|")]
    assert cells[:3] == ["all", "2", "+1.0"] and cells[5:8] == ["1 of 2", "+0.0 (b, 4, 9)", "+0.5 %"]
    assert cells[9:] == ["+3.0 % (b, 4, 9)", "+1.0 (1)"]
    errors = (1 / 3 + 0.5 / 2) ** 0.5 / 2  # of +1, +2, +3 and -0.5, +0.5
    freedom = (1 / 3 + 0.5 / 2) ** 2 / ((1 / 3) ** 2 / 2 + (0.5 / 2) ** 2)
    assert cells[3].startswith(f"{2 * student.sf(1.0 / errors, freedom):.3f} ")


def test_evidence_is_of_seeds_that_chose_nothing():
    chose = {*settings.SEEDS, *(seed for _, _, seeds in settings.ROUNDS.values() for seed in seeds)}
    assert not chose & {*settings.EVIDENCE_SEEDS}


def test_nothing_is_chosen_on_the_test_split():
    without_test = [{name: value for name, value in line.items() if name != "test"} for line in LINES]
    assert selection.test_runs(without_test).rates == RUNS.rates  # a KeyError if it looked
    blind, seen = selection.Runs(without_test), selection.Runs(LINES)
    for name, given in settings.ROUNDS.items():
        assert tables.search(blind, *given) == tables.search(seen, *given)
        assert name == "search-first" or not {*given[2]} & {*settings.SEEDS}, name


def test_the_rate_is_that_of_best_mean_validation_accuracy():
    def chosen(nll=None, **accuracies):
        rows = [
            {"task": "t", "rank": 4, "examples": 9, "method": "m", "lr": float(lr.strip("_")), "seed": seed}
            | {"validation.accuracy": accuracy, "validation.nll": (nll or {}).get(lr, 1.0)}
            for lr, by_seed in accuracies.items()
            for seed, accuracy in enumerate(by_seed)
        ]
        return selection.choose_rates(pd.DataFrame(rows))["t", 4, 9, "m"]

    assert chosen(_1=(50, 60), _2=(54, 58), _3=(10, 90)) == 2
    assert chosen(_1=(50, 60), _2=(55, 55), nll={"_2": 0.9}) == 2  # ties go by NLL
    assert chosen(_2=(50, 60), _1=(55, 55)) == 1  # then by the lowest
    assert chosen(_1=(50, 60, 99, 99), _2=(54, 58)) == 2  # by the seeds they share


def test_runs_on_another_backbone_than_loras_are_no_pair():
    def line(method, seed, test, **backbone):
        figures = {"validation": {"accuracy": 70, "nll": 1.0}, "test": {"accuracy": test, "nll": 1.0}}
        keys = {"task": "t", "rank": 4, "examples": 9, "method": method, "lr": 0.1, "seed": seed}
        return {**keys, **figures, **backbone}

    runs = selection.Runs(
        [
            *(line("lora", seed, 60) for seed in (0, 1)),  # from before backbones were named
            line("lora", 2, 60, backbone="one"),
            line("structlora", 0, 62),
            line("structlora", 1, 99, backbone="one"),
            line("structlora", 2, 63, backbone="one"),
            line("structlora", 3, 99, backbone="one"),
        ]
    )
    assert runs.differences(("t", 4, 9), "structlora", "accuracy").to_dict() == {0: 2, 2: 3}
    assert list(runs.best(("t", 4, 9), "structlora").index) == [0, 2, 3]


def test_differences_pair_seeds_at_each_methods_own_rate():
    def line(method, lr, seed, validation, test):
        figures = {"validation": {"accuracy": validation, "nll": 1.0}, "test": {"accuracy": test, "nll": 1.0}}
        return {"task": "t", "rank": 4, "examples": 9, "method": method, "lr": lr, "seed": seed, **figures}

    runs = selection.Runs(
        [
            *(line("lora", 0.1, s, 70, 60 + s) for s in range(3)),
            *(line("lora", 0.2, s, 60, 99) for s in range(3)),  # best on test, never chosen
            *(line("structlora", 0.2, s, 70, 62 + s) for s in (1, 2, 3)),
        ]
    )
    assert runs.differences(("t", 4, 9), "structlora", "accuracy").to_dict() == {1: 2, 2: 2}


@pytest.fixture
def tiny_task(monkeypatch):
    """Digits with an untrained ViT of three layers, a few steps long."""

    def build():
        shape = {
            "image_size": 28,
            "patch_size": 14,
            "num_channels": 1,
            "hidden_size": 64,
            "intermediate_size": 64,
        }
        return ViTForImageClassification(
            ViTConfig(**shape, num_hidden_layers=3, num_attention_heads=2, num_labels=10)
        )

    if not any(name.endswith(".q_proj") for name, _ in build().named_modules()):
        pytest.skip("the suite runs on the newest stack: this transformers has other names in ViT")
    task = dataclasses.replace(tasks.TASKS["digits"], build=build, steps=8, batch=4)
    monkeypatch.setitem(tasks.TASKS, "digits", task)
    return task


def outcome(line):
    return line["validation"], line["test"], line["diagnostics"]


def test_every_method_trains_and_no_two_are_alike(tiny_task):
    lines = {name: cell.run("digits", name, 4, 20, 1e-2, 3) for name in methods.METHODS if name != "select"}
    assert all(math.isfinite(line["test"]["nll"]) for line in lines.values())
    found = {name: (line["trained"], *outcome(line)) for name, line in lines.items()}
    alike = [pair for pair in itertools.combinations(found, 2) if found[pair[0]] == found[pair[1]]]
    assert alike == [("structlora", "adjacency")]  # a run of eight steps ends before the first semantic edges


def test_a_run_is_deterministic(tiny_task):
    one, again = (
        {**cell.run("digits", "structlora", 4, 20, 1e-2, 3), "cpu_seconds": 0, "seconds": 0} for _ in range(2)
    )
    assert one == again


def test_right_answers_are_kept_and_calibration_is_measured():
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    found = measures.figures(logits, torch.tensor([0, 1, 1, 1]))
    assert store.unpacked(found["right"]) == [True, False, True, False]
    assert found["accuracy"] == 50 and found["ece"] == pytest.approx(
        100 * (1 / (1 + math.exp(-2)) - 0.5), abs=1e-2
    )
    assert store.unpacked(store.packed([False, False, True])) == [False, False, True]


def test_without_coordinator_nothing_else_differs(tiny_task):
    """Θ that stays at zero passes no message."""
    gates, whole = (
        cell.run("digits", name, 4, 20, 1e-2, 3) for name in ("gates", "structlora:coordinator_lr=0")
    )
    for split in ("validation", "test"):
        assert gates[split] == pytest.approx(whole[split], rel=1e-4)


def test_an_idea_whose_code_is_not_kept_has_a_name_and_cannot_run(tiny_task):
    method = methods.find("gat:edges=adjacency,temperature=0.2,x_theta=0.5")
    assert method.structlora == {
        "coordinator": "gat",
        "edges": "adjacency",
        "temperature": 0.2,
        "x_theta": 0.5,
    }
    assert method.options()["temperature"] == 0.2 and method.options()["x_theta"] == 0.5
    with pytest.raises(SystemExit, match="x_theta"):
        cell.run("digits", "gat:x_theta=0.5", 4, 20, 1e-2, 3)


def test_a_grid_goes_on_where_it_stopped(tiny_task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assets, "CACHE", tmp_path / "cache")
    cells = [("digits", "lora", 4, 20, 1e-2, seed) for seed in range(2)]
    run.work(cells[:1], tmp_path / "results")
    run.work(cells, tmp_path / "results")
    run.work(cells, tmp_path / "results")
    assert [store.key_of(line) for line in store.read(tmp_path / "results")] == cells
    with run.claim(cells[0]) as ours, run.claim(cells[0]) as theirs:
        assert ours and not theirs


def test_splits_are_disjoint_and_examples_follow_from_the_seed():
    task = tasks.TASKS["digits"]
    splits = [
        {tuple(image.flatten().tolist()) for image in split.inputs["pixel_values"]} for split in task.load()
    ]
    pool, validation, test = splits
    assert not (pool & validation or pool & test or validation & test)
    one, same, other = (task.training_examples(100, seed) for seed in (0, 0, 1))
    assert torch.equal(one.labels, same.labels) and torch.equal(
        one.inputs["pixel_values"], same.inputs["pixel_values"]
    )
    assert not torch.equal(one.inputs["pixel_values"], other.inputs["pixel_values"])
    assert one.labels.bincount().tolist() == [10] * 10
    noisy = dataclasses.replace(task, noise=0.4).training_examples(100, 0)
    assert 0.2 < (noisy.labels != one.labels).float().mean() < 0.5
    batches = task.batches(100, 0)
    assert [len(batch) for batch in batches] == [task.batch] * task.steps
    seen = torch.cat(batches).bincount(minlength=100)
    assert seen.max() - seen.min() <= 1  # whole epochs
