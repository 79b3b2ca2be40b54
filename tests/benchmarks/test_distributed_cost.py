"""The arithmetic of `benchmarks/cost/distributed.py`: what leaves a rank, and what the analytical model makes of it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cost import distributed, scale
from benchmarks.cost.overhead import OURS, SMOLLM2_STACK

pytestmark = pytest.mark.slow

# Numbers of SmolLM2's q and v, r = 8, of which lora_A is mapped; and of the one all-reduce: Θ, and three flags.
OF_A, REDUCED = 30 * 8 * (576 + 576), 2 * 8 * 8 + 3


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
        ("alltoall_base", (numbers(100), numbers(100), None, [], []), 300),
        ("alltoall_base", (numbers(7), numbers(10), None, [7, 0, 0, 0], [2, 5, 3, 0]), 20),  # rank 1 keeps 5
        ("alltoall_base", (numbers(3), numbers(0), None, [3, 0, 0, 0], [0, 0, 0, 0]), 0),
    ],
)
def test_what_leaves_a_rank(name, args, sent):
    assert distributed.bytes_sent(name, args, rank=1, ranks=4) == sent


def test_a_collective_without_a_rule_is_an_error():
    with pytest.raises(NotImplementedError, match="gather_nothing"):
        distributed.bytes_sent("gather_nothing", ([numbers(1)],), rank=0, ranks=2)


def exchanged(count: int, ranks: int) -> float:
    return 4 * count * (ranks - 1) / ranks**2


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(
    # How often lora_A moves between slices and fragments, and is gathered.
    ("engine", "method", "moved", "gathered", "collectives"),
    [
        *((engine, "gates", 0, 0, 0) for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3")),
        ("ddp", "structlora", 0, 0, 0),
        ("fsdp2", "structlora", 4, 0, 5),
        ("zero2", "structlora", 3, 1, 5),
        ("zero3", "structlora", 3, 1, 5),  # so small that it stays whole on every rank
    ],
)
def test_communication_of_a_step(engine, method, moved, gathered, collectives, ranks):
    found = scale.communication(SMOLLM2_STACK, method, engine, ranks)
    assert found.collectives == collectives
    sums = 2 * (ranks - 1) / ranks * 4 * REDUCED if collectives else 0
    sent = exchanged(moved * OF_A, ranks) + 4 * gathered * OF_A * (ranks - 1) / ranks + sums
    assert found.sent_bytes(ranks) == pytest.approx(sent)


@pytest.mark.parametrize(
    ("sizes", "lots"), [([], 0), ([1], 1), ([2**24, 2**24], 1), ([2**24, 2**24, 1], 2), ([2**30, 1, 1], 2)]
)
def test_small_factors_share_a_gather(sizes, lots):
    assert scale.lots(sizes) == lots


@pytest.mark.parametrize(
    ("rank", "ranks", "holders"), [(8, 2, 2), (8, 3, 3), (8, 6, 4), (16, 64, 16), (64, 64, 64)]
)
def test_rows_are_held_by_as_many_ranks_as_there_are(rank, ranks, holders):
    assert scale.row_holders(rank, ranks) == holders


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_what_a_rank_holds_falls_as_one_over_n(engine, method):
    held = {ranks: scale.held(SMOLLM2_STACK, method, engine, ranks) for ranks in (2, 8)}
    for part in ("latents", "running_mean", "origins", "places"):
        few, many = (getattr(held[ranks], part) for ranks in (2, 8))
        assert many == pytest.approx(few / 4), part


@pytest.mark.parametrize("estimate", scale.estimates(scale.COUNTED).items(), ids=lambda estimate: estimate[0])
def test_a_large_model_pays_little(estimate):
    name, found = estimate
    assert found["step_time_ratio"] <= 1 + scale.MOST_STEP_SHARE, name
    assert found["memory_ratio"] <= 1 + scale.MOST_MEMORY_SHARE, name


def test_work_is_taken_from_counts_of_both_engines():
    """2 kinds, 60 modules and 120 factors; gates are in every method."""
    of_gates = {"map_passes": 1.0, "passing_bytes": 0, "share_bytes": 100, "map_operations": 60 * 5}
    counts = {
        engine: {
            "gates": of_gates,
            "structlora": {
                "map_passes": 9.0,
                "passing_bytes": 300,
                "share_bytes": 100,
                "map_operations": 60 * 5 + more,
            },
        }
        for engine, more in {"fsdp2": 20, "zero3": 20 + 120}.items()
    }
    found = scale.work_of(counts)
    assert found["fsdp2"]["gates"] == scale.Work(0.0, 0, 0, 5, 0.0)
    assert found["zero3"]["structlora"] == scale.Work(8.0, 10, 1, 5, 3.0)
    assert scale.work_of({}) == scale.COUNTED


def test_counts_that_the_model_does_not_predict_are_told():
    predicted = scale.predicted(SMOLLM2_STACK, "gates", "fsdp2", 2)
    counts = {name: expected for name, (expected, _) in predicted.items()}
    assert not list(distributed.disagreements(2, "fsdp2", {"gates": counts}))
    (told,) = distributed.disagreements(2, "fsdp2", {"gates": {**counts, "collectives": 3}})
    assert told == "fsdp2, 2 processes, gates: collectives is 3, the model predicts 0"


def test_ratios_are_taken_within_a_round():
    rounds = [
        {
            m: {clock: value for clock in distributed.CLOCKS}
            for m, value in zip(distributed.METHODS, seconds, strict=True)
        }
        for seconds in ((1.0, 1.1, 1.2), (2.0, 2.0, 2.2), (4.0, 4.8, 4.4))
    ]
    found = distributed.time_figures(rounds)
    assert dict(zip(OURS, (1.1, 1.1), strict=True)) == found["wall_time_ratio"]
    assert found["cpu_seconds"]["lora"] == 2.0
