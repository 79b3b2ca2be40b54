"""What `benchmarks/cost/distributed.py` counts in real processes is what the analytical model predicts."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cost import distributed, scale
from benchmarks.cost.overhead import OURS
from tests.support.launching import one_at_a_time

pytestmark = pytest.mark.slow


def numbers(count: int) -> torch.Tensor:
    return torch.empty(count)


@pytest.mark.parametrize(
    ("name", "args", "sent"),
    [
        ("allreduce", ([numbers(100)],), 2 * 3 / 4 * 400),
        ("allgather_base", (numbers(100), numbers(25)), 300),
        ("allgather", ([[numbers(25)] * 4], [numbers(25)]), 300),
        ("reduce_scatter_base", (numbers(25), numbers(100)), 300),
        ("broadcast", ([numbers(100)],), 300),
    ],
)
def test_what_leaves_a_rank(name, args, sent):
    assert distributed.bytes_sent(name, args, ranks=4) == sent


@one_at_a_time
@pytest.mark.parametrize(
    ("engine", "processes"), [("ddp", 2), ("fsdp2", 3), ("zero1", 2), ("zero2", 3), ("zero3", 2)]
)
def test_counts_are_what_the_model_predicts(engine, processes):
    """8 rows of lora_A do not divide by 3 processes."""
    counts = distributed.start(engine, processes, ["--counts"])["counts"]
    assert not list(scale.disagreements(engine, processes, counts))
    ours, gates = counts["structlora"], counts["gates"]
    if engine == "fsdp2":  # which the estimates for a GPU are made of
        mapped = scale.SMOLLM2.mapped_bytes
        assert (ours["traffic"] - gates["traffic"]) / mapped == pytest.approx(scale.PASSES, rel=0.1)
        assert (ours["operations"] - gates["operations"]) / 2 == pytest.approx(scale.OPERATIONS, rel=0.1)
        assert gates["operations"] / scale.SMOLLM2.modules == pytest.approx(scale.OF_GATE, rel=0.1)


def test_counts_that_the_model_does_not_predict_are_told():
    predicted = scale.added(scale.SMOLLM2, "gates", "fsdp2", 2)
    (told,) = scale.disagreements("fsdp2", 2, {"gates": {**predicted, "collectives": 3}})
    assert told == "fsdp2, 2 processes, gates: collectives is 3, predicted is 1"


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_large_model_pays_little(engine, method):
    assert scale.estimate(method, engine, 64)["step_time_ratio"] <= 1.02
