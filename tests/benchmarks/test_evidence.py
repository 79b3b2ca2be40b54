"""The benchmark suite: how runs are chosen and compared, and that every method trains. What the store holds: `tests/docs`."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pandas as pd
import pytest
import torch
from peft.tuners.lora import LoraLayer
from scipy.stats import ttest_1samp
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.quality import (
    assets,
    cell,
    grids,
    measures,
    methods,
    run,
    selection,
    settings,
    shrinking,
    store,
    tables,
    tasks,
)
from benchmarks.quality.settings import Comparison, Place, Row
from tests.support.tiny import peft_model

pytestmark = pytest.mark.slow


def line(method="lora", lr=0.1, seed=0, validation=70.0, test=60.0, nll=1.0, task="t", **more) -> dict:
    figures = {
        "validation": {"accuracy": validation, "nll": nll},
        "test": {"accuracy": test, "nll": nll, "ece": 5.0},
    }
    keys = {"task": task, "rank": 4, "examples": 9, "method": method, "lr": lr, "seed": seed}
    return {**keys, **figures, "structlora": None, **more}


PLACE = Place("t", 4, 9, (0.1, 0.2), tuple(range(4)), (0, 1))


@pytest.mark.parametrize(
    "accuracies, nll, best",
    [
        ({1: (50, 60), 2: (54, 58), 3: (10, 90)}, {}, 2),
        ({1: (50, 60), 2: (55, 55)}, {2: 0.9}, 2),  # ties go by NLL
        ({2: (50, 60), 1: (55, 55)}, {}, 1),  # then by the lowest
        ({1: (50, 60, 99, 99), 2: (54, 58)}, {}, 2),  # by the seeds they share
    ],
)
def test_the_rate_is_that_of_best_mean_validation_accuracy(accuracies, nll, best):
    rows = [
        {"lr": lr, "seed": seed, "validation.accuracy": accuracy, "validation.nll": nll.get(lr, 1.0)}
        for lr, by_seed in accuracies.items()
        for seed, accuracy in enumerate(by_seed)
    ]
    assert selection.choose_rate(pd.DataFrame(rows)) == best


def test_a_table_pairs_seeds_at_each_methods_own_rate():
    gains = (2.0, 4.0, 9.0)
    runs = selection.Runs(
        [
            *(line(seed=seed, test=60 + seed) for seed in range(3)),
            *(
                line(lr=0.2, seed=seed, validation=60, test=99) for seed in range(3)
            ),  # best on test, never chosen
            *(line("dora", 0.2, seed, test=60 + seed + gain) for seed, gain in enumerate(gains)),
            line("dora", 0.2, seed=3, test=0.0),  # without its pair
            line("dora", 0.2, seed=9, test=0.0),  # of another table
        ]
    )
    comparison = Comparison(
        (PLACE,), (Row("lora"), Row("dora"), Row("pissa")), groups={"all": (PLACE, PLACE)}
    )
    written = tables.compared(runs, comparison)
    rows = [[cell.strip() for cell in text.strip("|").split("|")] for text in written.splitlines()[2:]]
    assert [row[:3] for row in rows[:2]] == [["t, 4, 9", "LoRA", "3"], ["t, 4, 9", "DoRA", "4"]]
    low, high = ttest_1samp(gains, 0).confidence_interval()
    assert rows[1][6:] == [
        f"+5.0 ({low:+.1f} to {high:+.1f})",
        "+0.000 (+0.000 to +0.000)",
        "+0.0 (+0.0 to +0.0)",
    ]
    assert rows[3][0] == "mean of 2: all" and rows[3][6] == rows[1][6]


def test_runs_on_another_backbone_than_loras_are_no_pair():
    runs = selection.Runs(
        [
            line(seed=0),  # from before backbones were named
            line(seed=1, backbone="one"),
            line("dora", seed=0),
            line("dora", seed=1, backbone="one"),
            line("dora", seed=2, backbone="one"),
            line("pissa", seed=0, backbone="one"),
        ]
    )
    place = dataclasses.replace(PLACE, rates=(0.1,))
    assert list(runs.runs(place, Row("dora")).index) == [0, 1, 2]
    assert runs.runs(place, Row("pissa")).empty


def test_a_machine_leaves_out_the_cells_that_pair_with_another_backbone():
    lines = [line(seed=0), line(seed=1, backbone="one"), line("dora", seed=2, backbone="two")]
    cells = [("t", "dora", 4, 9, 0.1, seed) for seed in range(4)]
    assert run.without_a_pair(cells, lines, lambda: "one") == set()
    assert run.without_a_pair(cells, lines, lambda: "two") == {cells[1]}
    assert run.without_a_pair(cells, lines[:1], None) == set()  # nothing to ask for


def test_a_grid_asks_for_the_seeds_of_the_rate_that_was_chosen(monkeypatch):
    accuracy = {0.1: 60, 0.2: 70, 0.4: 50}  # the last because 0.2 was at the end
    lines = [line(lr=lr, seed=seed, validation=right) for lr, right in accuracy.items() for seed in (0, 1)]
    monkeypatch.setattr(store, "read", lambda: lines)
    comparison = Comparison((dataclasses.replace(PLACE, goes_beyond=True),), (Row("lora"), Row("dora")))
    monkeypatch.setitem(settings.COMPARISONS, "t", comparison)
    cells = [cell[1:2] + cell[4:] for cell in grids.cells_of("t")]
    lora = [(lr, seed) for lr in (0.1, 0.2, 0.4) for seed in (0, 1)] + [(0.2, 2), (0.2, 3)]
    dora = [(lr, seed) for lr in (0.1, 0.2, 0.4) for seed in (0, 1)]  # 0.4 as `FURTHER_RATES` says
    assert sorted(cells) == sorted([("lora", *at) for at in lora] + [("dora", *at) for at in dora])
    lines[:] = lines[:1]  # what chooses a rate is run where no table shows it
    monkeypatch.setitem(settings.COMPARISONS, "t", Comparison((PLACE,), (Row("pissa", rate_of="lora"),)))
    assert {cell[1] for cell in grids.cells_of("t")} == {"lora"}
    lines[:] = [line(lr=lr, seed=seed, validation=right) for lr, right in accuracy.items() for seed in (0, 1)]
    elsewhere = dataclasses.replace(PLACE, task="more tests", rates=tuple(accuracy), chosen_on=PLACE.task)
    monkeypatch.setitem(settings.COMPARISONS, "t", Comparison((elsewhere,), (Row("lora"),)))
    chosen = [("more tests", "lora", 4, 9, 0.2, seed) for seed in range(4)]
    assert [cell for cell in grids.cells_of("t") if cell[0] != PLACE.task] == chosen


def test_a_rate_that_another_table_asked_for_chooses_nothing():
    accuracy = {0.1: 60, 0.2: 70, 0.4: 50, 0.025: 99}
    lines = [line(lr=lr, seed=seed, validation=right) for lr, right in accuracy.items() for seed in (0, 1)]
    place = dataclasses.replace(PLACE, goes_beyond=True)
    runs = selection.Runs(lines)
    assert runs.rate(place, Row("lora")) == 0.2
    assert runs.tried(place, Row("lora")) == [0.1, 0.2, 0.4]
    # 0.4 is worse than 0.2: the search does not come to these
    lines += [line(lr=lr, seed=seed, validation=80) for lr in (0.8, 1.6) for seed in (0, 1)]
    assert selection.Runs(lines).rate(place, Row("lora")) == 0.2


def test_nothing_is_chosen_on_the_test_split():
    """A KeyError if it looked."""
    lines = store.read()
    blind = selection.Runs(
        [{name: value for name, value in line.items() if name != "test"} for line in lines]
    )
    seen = selection.Runs(lines)
    rows = {
        (place, dataclasses.replace(row, column="test", label=None))
        for comparison in settings.COMPARISONS.values()
        for place, row in itertools.product(comparison.places, comparison.rows)
    }
    assert all(blind.rate(*row) == seen.rate(*row) for row in rows)


def test_adapters_are_cut_to_their_largest_directions():
    model = peft_model("llama", "warm", rank=4)
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    before = [layer.get_delta_weight("default").detach() for layer in layers]
    assert measures.truncate(model, 2) == len(layers) > 0
    for layer, whole in zip(layers, before, strict=True):
        U, S, V = torch.linalg.svd(whole)
        torch.testing.assert_close(
            layer.get_delta_weight("default"), U[:, :2] * S[:2] @ V[:2], atol=1e-6, rtol=1e-4
        )


def test_the_scalar_is_chosen_on_validation_and_the_adapter_left_as_it_was():
    model = peft_model("llama", "warm", rank=4)
    (_, B), *_ = measures.lora_factors(model).values()
    before = B.detach().clone()

    def figures(of_scale) -> dict:
        scale = (B / before).nanmean().item()
        return {"nll": of_scale(scale), "accuracy": round(scale, 3)}

    def tried(nll):
        return measures.scaled(
            model, {"nll": nll}, lambda: figures(lambda s: abs(s - 0.5)), lambda: figures(abs)
        )

    assert tried(1.0)["scale"] == tried(1.0)["accuracy"] == 0.5
    assert tried(-1.0) is None and torch.equal(B, before)


def test_the_temperature_is_chosen_on_validation():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (2000,), generator=generator)
    sure = 6 * (torch.nn.functional.one_hot(labels, 4) + torch.randn(2000, 4, generator=generator))
    (chosen, measured), whole = sure.split(1000), measures.figures(sure[1000:], labels[1000:])
    found = measures.tempered((chosen, labels[:1000]), (measured, labels[1000:]))
    # Logits of unit noise around a one-hot mean are calibrated, whatever they were multiplied by.
    assert found["temperature"] == pytest.approx(6, rel=0.15) and found["accuracy"] == whole["accuracy"]
    assert found["nll"] < whole["nll"] and found["ece"] < whole["ece"]
    other = measures.tempered((chosen, labels[:1000]), (measured, labels[1000:].roll(1)))
    assert other["temperature"] == found["temperature"]


def test_right_answers_are_kept_and_calibration_is_measured():
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    found = measures.figures(logits, torch.tensor([0, 1, 1, 1]))
    assert store.unpacked(found["right"]) == [True, False, True, False] and found["accuracy"] == 50
    assert found["ece"] == pytest.approx(100 * (1 / (1 + math.exp(-2)) - 0.5), abs=1e-2)


def test_controls_draw_as_much_as_they_stand_for():
    gate = methods.RandomGate(variance=3.0)
    gates = gate.sample(torch.zeros(4000, 2, 8))
    assert gates.shape == (4000, 1, 8) and sorted(gates.unique().tolist()) == [0.0, 4.0]
    assert gates.mean().item() == pytest.approx(1.0, abs=0.05)
    assert methods.by_chance(torch.arange(1.0, 101.0), 0.25).sum() == 25
    assert not torch.equal(*(methods.by_chance(torch.ones(100), 0.5) for _ in range(2)))


def test_penalties_are_of_the_updates_of_neighbours():
    model = peft_model("llama", "warm", rank=2)
    kinds: dict[tuple, list] = {}
    for name, (A, B) in measures.lora_factors(model).items():
        kinds.setdefault((measures.kind_of(name), A.shape, B.shape), []).append(B @ A)
    pairs = [pair for updates in kinds.values() for pair in itertools.pairwise(updates)]
    cosine = sum(1 - torch.cosine_similarity(one.flatten(), two.flatten(), dim=0) for one, two in pairs)
    torch.testing.assert_close(methods.METHODS["lora-cos"].penalty(model), cosine)
    laplacian = sum((one - two).square().sum() for one, two in pairs)
    torch.testing.assert_close(methods.METHODS["lora-laplacian"].penalty(model), laplacian)


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
    task = dataclasses.replace(tasks.TASKS["digits"], build=build, steps=24, batch=8)
    monkeypatch.setitem(tasks.TASKS, "digits", task)
    return task


def test_every_method_trains_and_no_two_are_alike(tiny_task):
    given = {"squeeze": "squeeze:to=2", "random-selection": "random-selection:keep=0.5"}
    names = [given.get(name, name) for name in methods.METHODS]
    names.remove("shrink")  # trains as LoRA does
    found = {}
    for name in (*names, "structlora:keep=0.5"):
        line = cell.run("digits", name, 4, 10, 1e-2, 3)
        assert math.isfinite(line["test"]["nll"])
        found[name] = line["trained"], line["validation"], line["test"], line["diagnostics"]
    alike = [pair for pair in itertools.combinations(found, 2) if found[pair[0]] == found[pair[1]]]
    assert alike in ([], [("structlora", "adjacency")])  # of three depths two may gain a semantic edge
    again = cell.run("digits", "structlora", 4, 10, 1e-2, 3)
    assert (again["trained"], again["validation"], again["test"], again["diagnostics"]) == found["structlora"]
    smaller = cell.run("digits", "shrink:keep=0.5", 4, 10, 1e-2, 3)["shrunk"]
    assert smaller.keys() == set(shrinking.RULES) and all(rule["rank"] <= 4 for rule in smaller.values())


def test_a_grid_goes_on_where_it_stopped(tiny_task, tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "CACHE", tmp_path / "cache")
    cells = [("digits", "lora", 4, 20, 1e-2, seed) for seed in range(2)]
    for some in (cells[:1], cells, cells):
        run.work(some, tmp_path / "results")
    assert [store.key_of(line) for line in store.read(tmp_path / "results")] == cells
    with run.claim(cells[0]) as ours, run.claim(cells[0]) as theirs:
        assert ours and not theirs


def test_splits_are_disjoint_and_examples_follow_from_the_seed():
    task = tasks.TASKS["digits"]
    pool, validation, test = (
        {tuple(image.flatten().tolist()) for image in split.inputs["pixel_values"]} for split in task.load()
    )
    assert not (pool & validation or pool & test or validation & test)
    one, same, other = (task.training_examples(100, seed) for seed in (0, 0, 1))
    assert torch.equal(one.labels, same.labels)
    pixels, again, others = (split.inputs["pixel_values"] for split in (one, same, other))
    assert torch.equal(pixels, again) and not torch.equal(pixels, others)
    assert one.labels.bincount().tolist() == [10] * 10
    noisy = dataclasses.replace(task, noise=0.4).training_examples(100, 0)
    assert 0.2 < (noisy.labels != one.labels).float().mean() < 0.5
    batches = task.batches(100, 0)
    assert [len(batch) for batch in batches] == [task.batch] * task.steps
    seen = torch.cat(batches).bincount(minlength=100)
    assert seen.max() - seen.min() <= 1  # whole epochs
