"""Runs by passes over few examples: their length and their cells; and the trials of noise before them."""

import pytest
import torch

from benchmarks.quality import grids, noise, store, tasks
from benchmarks.quality.settings import COMPARISONS, FEW_PASSES, MANY_PASSES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("passes", [*FEW_PASSES, *MANY_PASSES])
def test_a_run_is_as_long_as_its_passes(passes):
    task = tasks.find(f"digits-all@{passes}", 100)
    assert task.steps * task.batch == pytest.approx(100 * passes, abs=task.batch / 2)
    assert tasks.steps_of(f"smollm-numbers-few@{passes}", 64, 8, otherwise=40) == 8 * passes
    assert tasks.find("digits-all", 100) == tasks.TASKS["digits-all"]


@pytest.mark.parametrize("name", ["passes", "passes-few"])
def test_every_method_chooses_its_rate_with_as_many_runs(name, monkeypatch):
    others = [line for line in store.read() if tasks.AT_PASSES not in line["task"]]
    monkeypatch.setattr(store, "read", lambda: others)  # before the first run
    comparison = COMPARISONS[name]
    cells = grids.cells_of(name)
    own = [row.method for row in comparison.rows if row.rate_of is None]
    for place in comparison.places:
        runs = [cell[1] for cell in cells if cell[0] == place.task]
        assert {method: runs.count(method) for method in own} == dict.fromkeys(own, 9)


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
