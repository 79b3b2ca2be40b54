"""The benchmark suite: how runs are chosen and compared, and that every method trains. What the store holds: `tests/docs`."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from scipy.stats import ttest_1samp
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.quality import (
    after_training,
    assets,
    cell,
    measures,
    methods,
    run,
    selection,
    settings,
    store,
    tables,
    tasks,
)
from benchmarks.quality.settings import GRIDS, METHODS, Grid, Place
from tests.support.data import save_base
from tests.support.tiny import peft_model

pytestmark = pytest.mark.slow

TASK = "digits-all@12"


def line(method="lora", lr=0.1, seed=0, validation=1.0, test=60.0, nll=1.0, task="t@1", **more) -> dict:
    figures = {
        "validation": {"accuracy": 70.0, "nll": validation},
        "test": {"accuracy": test, "nll": nll, "ece": 5.0},
    }
    keys = {"task": task, "rank": 8, "examples": 9, "method": method, "lr": lr, "seed": seed}
    return {**keys, **figures, "structlora": None, **more}


PLACE = Place("t@1", 9, seeds=(0, 1, 2, 3), rates=(0.1, 0.2), choosing=(10, 11))
AT_ONE_RATE = dataclasses.replace(PLACE, rates=(0.1,), choosing=())


def test_a_rate_is_that_of_lowest_mean_validation_nll():
    nlls = {0.1: (1.0, 1.4), 0.2: (1.3, 1.0)}
    lines = [
        line(lr=lr, seed=10 + i, validation=nll) for lr, found in nlls.items() for i, nll in enumerate(found)
    ]
    others = [line(lr=0.4, seed=10, validation=0.0), line(lr=0.1, seed=0, validation=0.0)]
    assert selection.Runs([*lines, *others]).rate(PLACE, "lora") == 0.2
    assert selection.Runs(lines[:-1]).rate(PLACE, "lora") is None  # one still has to run


def test_a_table_pairs_seeds():
    gains = (2.0, 4.0, 9.0)
    runs = selection.Runs(
        [
            *(line(seed=seed, test=60 + seed) for seed in range(3)),
            line(lr=0.2, seed=0, test=99),  # at another rate
            *(line("lora-early", seed=seed, test=60 + seed + gain) for seed, gain in enumerate(gains)),
            line("lora-early", seed=3, test=0.0),  # without its pair
            line("lora-early", seed=9, test=0.0),  # of another table
        ]
    )
    grid = Grid({"all": (AT_ONE_RATE, AT_ONE_RATE)}, ("lora", "lora-early"))
    written = tables.compared(runs, grid, [("lora", "test"), ("lora-early", "test")])
    assert written.startswith("1 of 8 runs are missing.")
    rows = [[cell.strip() for cell in text.strip("|").split("|")] for text in written.splitlines()[4:]]
    assert rows[0][:3] == ["t@1, 9 examples", "LoRA", "3"] and rows[1][1:3] == ["LoRA, early stopping", "4"]
    low, high = ttest_1samp(gains, 0).confidence_interval()
    assert rows[1][6:] == [
        f"+5.0 ({low:+.1f} to {high:+.1f})",
        "+0.000 (+0.000 to +0.000)",
        "+0.0 (+0.0 to +0.0)",
    ]
    assert rows[-1][0] == "mean of 2: all" and rows[-1][6] == rows[1][6]


def test_the_primary_endpoint_is_against_the_best_rival(monkeypatch):
    def found(left_out=()):
        nlls = {"structlora": 0.5, "lora-dropout-0.3": 0.7}
        return [
            line(method, seed=seed, task=place.task, nll=nlls.get(method, 0.9) + seed / 10)
            for place in places
            for method in METHODS
            for seed in place.seeds
            if method not in left_out
        ]

    places = [dataclasses.replace(AT_ONE_RATE, task=f"t@{n}") for n in settings.PRIMARY]
    groups = {f"{n} epochs": (place,) for n, place in zip(settings.PRIMARY, places, strict=True)}
    monkeypatch.setitem(GRIDS, "main", Grid(groups, METHODS))
    sentence = tables.primary(selection.Runs(found()))
    assert "lora_dropout 0.3" in sentence and "-0.200 (-0.200 to -0.200)" in sentence
    assert "missing" in tables.primary(selection.Runs(found(["lora-early"])))


def test_runs_on_another_backbone_than_loras_are_no_pair():
    runs = selection.Runs(
        [
            line(seed=0),  # a task without a backbone of ours
            line(seed=1, backbone="one"),
            line(seed=3, backbone="one"),
            line("structlora", seed=0),
            line("structlora", seed=1, backbone="one"),
            line("structlora", seed=2, backbone="one"),
            line("structlora", seed=3, backbone="two"),
            line("halves", seed=3, backbone="two"),  # which are compared with each other alone
        ]
    )
    assert list(runs.runs(AT_ONE_RATE, "structlora").index) == [0, 1, 2]
    assert list(runs.runs(AT_ONE_RATE, "halves").index) == [3]


def test_a_machine_leaves_out_the_cells_that_pair_with_another_backbone():
    lines = [line(seed=0), line(seed=1, backbone="one"), line("structlora", seed=2, backbone="two")]
    cells = [("t@1", "structlora", 8, 9, 0.1, seed) for seed in range(4)]
    assert run.without_a_pair(cells, lines, lambda: "one") == set()
    assert run.without_a_pair(cells, lines, lambda: "two") == {cells[1]}
    assert run.without_a_pair(cells, lines[:1], None) == set()  # nothing to ask for


def test_a_grid_has_a_cell_for_each_seed_and_rate():
    grid = Grid({"all": (PLACE,)}, ("lora",))
    of_choice = [(lr, seed) for seed in PLACE.choosing for lr in PLACE.rates]
    cells = [cell[4:] for cell in selection.Runs([]).cells(grid)]
    assert cells == [*of_choice, *((None, seed) for seed in PLACE.seeds)]
    lines = [line(lr=lr, seed=seed, validation=lr) for lr, seed in of_choice]
    cells = selection.Runs(lines).cells(grid)
    assert [cell[4:] for cell in run.missing_of(cells, lines)] == [(0.1, seed) for seed in PLACE.seeds]


def test_every_method_of_a_grid_exists_and_chooses_with_as_many_runs():
    for grid in GRIDS.values():
        counts = dict.fromkeys(grid.methods, 0)
        for _, name, *_ in selection.Runs([]).cells(grid):
            counts[name] += 1
        assert len(set(counts.values())) == 1 and all(map(methods.find, grid.methods))
        assert not any({*place.seeds} & {*place.choosing} for place in grid.places)


def test_a_store_is_packed_and_read_as_it_was(tmp_path):
    first, second = line(seed=0), line(seed=1)
    store.append(first, tmp_path)
    assert store.pack(tmp_path) == 1
    store.append(second, tmp_path)
    assert store.read(tmp_path) == [first, second]
    assert store.pack(tmp_path) == 2 and store.read(tmp_path) == [first, second]
    assert [path.name for path in tmp_path.iterdir()] == [store.PACKED]


def test_nothing_is_chosen_on_the_test_split():
    """A KeyError if it looked."""
    lines = store.read()
    blind = selection.Runs(
        [{name: value for name, value in line.items() if name != "test"} for line in lines]
    )
    seen = selection.Runs(lines)
    for grid in GRIDS.values():
        for place, name in itertools.product(grid.places, grid.methods):
            assert blind.rate(place, name) == seen.rate(place, name)


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


def test_accuracy_and_calibration_are_of_the_labels_that_are_there():
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    found = measures.figures(logits, torch.tensor([0, 1, 1, 1]))
    assert found["accuracy"] == 50
    assert found["ece"] == pytest.approx(100 * (1 / (1 + math.exp(-2)) - 0.5), abs=1e-2)
    rows = torch.stack([logits, logits.flip(1)], 1)  # two labels of each example, of which one is there
    labels = torch.tensor([[0, -100], [1, -100], [1, -100], [1, -100]])
    assert measures.figures(rows, labels) == found


def test_early_stopping_returns_the_best_weights():
    model = torch.nn.Linear(1, 1)
    best = measures.BestSoFar(model)
    for nll in (3.0, 1.0, 2.0):
        torch.nn.init.constant_(model.weight, nll)
        best.see(nll)
    best.put_back()
    assert model.weight.item() == 1.0


@pytest.fixture
def tiny_task(monkeypatch):
    """Digits with an untrained ViT of three layers."""

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
    task = dataclasses.replace(tasks.TASKS["digits-all"], build=build, batch=8)
    monkeypatch.setitem(tasks.TASKS, "digits-all", task)
    return task


def test_every_method_trains_and_no_two_are_alike(tiny_task):
    found = {}
    for name in (*METHODS, "structlora:keep=0.5"):
        line = cell.run(TASK, name, 4, 20, 1e-2, 3)
        assert math.isfinite(line["test"]["nll"])
        assert ("gates" in line) == (name.startswith("structlora") and name != "structlora:gates=off")
        found[name] = line["validation"], line["test"], line["diagnostics"]
    alike = [pair for pair in itertools.combinations(found, 2) if found[pair[0]] == found[pair[1]]]
    assert alike in ([], [("lora", "lora-early")])  # where the last check is the best
    again = cell.run(TASK, "structlora", 4, 20, 1e-2, 3)
    assert (again["validation"], again["test"], again["diagnostics"]) == found["structlora"]
    assert again["cut"].keys() == {*after_training.RULES} and again["gates"]["deviation"] > 0


def test_each_rule_leaves_its_share(tiny_task):
    """After training, how many directions each rule leaves, and which."""
    task = tasks.find("digits-all@20", 20)
    training = task.training_examples(20, 0)
    model, runtime, _ = cell.train(task, methods.find("structlora:beta=30"), training, 8, 1e-2, 0)
    factors = measures.lora_factors(model)
    updates = {name: (B @ A).detach() for name, (A, B) in factors.items()}
    open_ones = {}

    def left() -> dict:
        """As accuracy how many directions are left, as NLL how far the update is from the whole."""
        error = sum((B @ A - updates[name]).square().sum() for name, (A, B) in factors.items())
        kept = torch.cat([B.any(0) for _, B in factors.values()])
        open_ones[len(open_ones)] = kept
        return {"accuracy": int(kept.sum()), "nll": float(error), "ece": 0.0}

    found = after_training.cut(model.eval(), runtime, training, 0, left)
    assert tuple(found) == after_training.RULES
    assert all(
        of_rule["quarter"]["accuracy"] == round(len(factors) * 8 / 4)
        for rule, of_rule in found.items()
        if rule != "singular"  # as far as one share of each update's norm allows
    )
    assert found["norm"]["quarter"]["nll"] < found["random"]["quarter"]["nll"]
    # The first rule is openness: no closed direction is more open than a kept one.
    openness = torch.cat([runtime.openness()[name.removesuffix(".default")] for name in factors])
    assert openness[open_ones[0]].min() >= openness[~open_ones[0]].max()


def test_gates_of_two_halves_are_compared(tiny_task):
    line = cell.run(TASK, "halves", 4, 20, 1e-2, 3)
    assert -1 <= line["halves"] <= 1 and line["steps"] == 15 and "cut" not in line


def test_a_grid_goes_on_where_it_stopped(tiny_task, tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "CACHE", tmp_path / "cache")
    place = Place("digits-all@2", 20, (5, 6), (1e-3, 1e-2), (0,))
    for seeds in ((5,), (5, 6), (5, 6)):
        run.work(Grid({"all": (dataclasses.replace(place, seeds=seeds),)}, ("lora",)), tmp_path / "results")
    cells = [store.key_of(line)[4:] for line in store.read(tmp_path / "results")]
    assert cells[:2] == [(1e-3, 0), (1e-2, 0)] and [seed for _, seed in cells[2:]] == [5, 6]
    key = ("digits-all@2", "lora", 8, 20, 1e-3, 0)
    with run.claim(key) as ours, run.claim(key) as theirs:
        assert ours and not theirs


@pytest.mark.parametrize("task", ["smollm-reviews@1", "smollm-phonemes@1"])
def test_a_language_model_answers(task, tmp_path, monkeypatch):
    """A tiny model in the place of SmolLM2."""
    save_base(tmp_path)
    monkeypatch.setattr(assets, "smollm", lambda: tmp_path)
    monkeypatch.setattr(assets, "sentences", lambda kind: [(f"w{i}", i % 2) for i in range(1450)])
    words = ["".join(letters) for letters in itertools.product("abcdefg", repeat=4)]
    monkeypatch.setattr(assets, "pronunciations", lambda: {word: [word[0], word[1]] for word in words})
    for cached in (tasks.rated_prompts, tasks._reviews, tasks._phonemes):
        cached.cache_clear()
    line = cell.run(task, "structlora", 4, 16, 1e-2, 3)
    for cached in (tasks.rated_prompts, tasks._reviews, tasks._phonemes):
        cached.cache_clear()
    assert line["steps"] == 2 and math.isfinite(line["test"]["nll"]) and "cut" in line


def test_splits_are_disjoint_and_examples_follow_from_the_seed():
    task = tasks.find("digits-all@15", 100)
    pool, validation, test = (
        {tuple(image.flatten().tolist()) for image in split.inputs["pixel_values"]} for split in task.load()
    )
    assert not (pool & validation or pool & test or validation & test)
    one, same, other = (task.training_examples(100, seed) for seed in (0, 0, 1))
    assert torch.equal(one.labels, same.labels)
    pixels, again, others = (split.inputs["pixel_values"] for split in (one, same, other))
    assert torch.equal(pixels, again) and not torch.equal(pixels, others)
    assert one.labels.bincount().tolist() == [10] * 10
    assert all(half.labels.bincount().tolist() == [5] * 10 for half in one.halves())
    batches = task.batches(100, 0)
    assert [len(batch) for batch in batches] == [task.batch] * task.steps
    seen = torch.cat(batches).bincount(minlength=100)
    assert seen.max() - seen.min() <= 1  # whole epochs
    assert task.steps * task.batch == pytest.approx(100 * 15, abs=task.batch / 2)
