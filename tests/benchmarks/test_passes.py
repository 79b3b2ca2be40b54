"""Runs by passes over few examples: their length, their cells, their table; and the trials of noise before them."""

import pytest
import torch

from benchmarks.quality import grids, language, noise, passes, store, tasks
from benchmarks.quality.settings import PASSES, PASSES_METHODS, PASSES_TASKS

LORA_NLL, GAIN = 1.0, 0.2


def line(key: tuple, seed_noise: float = 0.01) -> dict:
    ours = key[1].startswith("structlora")
    figures = {
        "accuracy": 70.0 + 2 * ours,
        "nll": LORA_NLL - GAIN * ours + seed_noise * (key[5] % 3),
        "ece": 10.0,
    }
    return dict(zip(store.KEY, key, strict=True)) | {
        "validation": figures,
        "test": figures,
        "structlora": None,
    }


@pytest.mark.parametrize("count", PASSES)
def test_a_run_is_as_long_as_its_passes(count):
    task = tasks.find(f"digits-all@{count}", 100)
    assert task.steps * task.batch == pytest.approx(100 * count, abs=task.batch / 2)
    assert language.find(f"smollm-numbers-few@{count}").length(64) == 8 * count
    assert tasks.find("digits-all", 100) is tasks.TASKS["digits-all"]


def test_every_method_of_the_grid_runs_at_as_many_rates_and_seeds():
    cells = grids.cells_of("passes")
    for task, (rank, examples, rates) in PASSES_TASKS.items():
        for count in PASSES:
            of_task = [c for c in cells if c[0] == f"{task}@{count}" and c[2:4] == (rank, examples)]
            methods = {c[1] for c in of_task}
            assert methods >= set(PASSES_METHODS) - {"lora-average"}
            assert len(of_task) == len(methods) * len(rates) * 3


def test_the_table_says_what_the_runs_say():
    lines = [line(cell) for cell in grids.cells_of("passes")]
    runs = passes.passes_runs(lines)
    mean, half, settings = passes.difference(
        runs, passes.settings_at(passes.LONG), "structlora", passes.BEST_DROPOUT, "nll"
    )
    assert (mean, half, settings) == (pytest.approx(-GAIN), pytest.approx(0, abs=1e-9), 2 * len(PASSES_TASKS))
    assert f"{-GAIN:+.3f}" in passes.table(lines)
    assert "grid passes" in passes.table([])


@pytest.mark.parametrize("law", ["gauss", "bernoulli", "gumbel"])
@pytest.mark.parametrize(
    ("per", "shape"), [("token", (4000, 5, 8)), ("example", (4000, 1, 8)), ("step", (8,))]
)
def test_noise_has_mean_one_and_the_variance_asked_for(law, per, shape):
    torch.manual_seed(0)
    drawn = noise.Noise(0.5, per, law).draw(torch.zeros(4000, 5, 8), 0.5)
    assert drawn.shape == shape
    if per != "step":
        assert drawn.mean().item() == pytest.approx(1, abs=0.03)
        assert drawn.var().item() == pytest.approx(0.5, abs=0.05)
