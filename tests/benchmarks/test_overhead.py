"""The benchmark of cost runs on small shapes, and counts what it says it counts."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from benchmarks.cost import lines, overhead

CLOCK = overhead.Clock(torch.device("cpu"))


@pytest.mark.slow
def test_methods_are_compared_on_one_model():
    shape = dict(zip(overhead.SIZES, (64, 64, 3, 4, 2, 64), strict=True))
    workload = dataclasses.replace(overhead.WORKLOADS["q+v"], batch=1, tokens=8, shape=shape)
    found = overhead.cost(workload, CLOCK, 2)
    assert found["rounds"] == 2 and found["step_time_ratio"]["lora"] == 1
    assert found["step_time_ratio"].keys() == found["peak_memory_ratio"].keys() == {*overhead.METHODS}
    assert 0 < found["added_ms"]["structlora"] < found["step_ms"]["structlora"]


def test_ratios_are_taken_within_a_round():
    rounds = [
        {"lora": (1.0, 0.0), "structlora": (1.1, 0.1), "gates": (1.2, 0.0)},
        {"lora": (2.0, 0.0), "structlora": (2.0, 0.2), "gates": (2.2, 0.0)},
        {"lora": (4.0, 0.0), "structlora": (4.8, 0.3), "gates": (4.4, 0.0)},
    ]
    found = overhead.time_figures(rounds)
    assert found["step_time_ratio"] == {"lora": 1.0, "structlora": 1.1, "gates": 1.1}
    assert found["step_ms"]["lora"] == 2000 and found["added_ratio"]["structlora"] == 1.1


def test_hooks_before_and_after_an_update_are_counted():
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    optimizer = torch.optim.SGD([parameter], lr=1.0)

    def attach():
        optimizer.register_step_pre_hook(lambda *_: time.sleep(0.05))
        optimizer.register_step_post_hook(lambda *_: time.sleep(0.05))

    timer = overhead.HookTimer(optimizer, CLOCK, attach)
    optimizer.step()
    assert timer.seconds() >= 0.1 and timer.seconds() == 0


def test_lines_of_code_are_neither_blank_nor_comments_nor_docstrings():
    source = '"""Two\nlines."""\n\n# why\ndef f():  # what\n    """Says."""\n    return """a\n\nb"""\n'
    assert lines.count(source) == (4, 2)
