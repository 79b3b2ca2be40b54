"""The benchmark of the map runs on small stacks, and counts what it says it counts."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.cost import overhead

pytestmark = pytest.mark.slow


def test_cost_of_a_small_map():
    stack = overhead.Stack("tiny", 3, 2, {"q_proj": (8, 16), "o_proj": (16, 8)})
    cpu = torch.device("cpu")
    found = overhead.map_cost(stack, cpu, overhead.Clock(cpu, cpu_time=True))
    assert found["lora_bytes"] == 3 * 2 * 4 * (2 * (8 + 16))
    assert found["held_bytes"]["latents"] == 3 * 2 * 4 * (
        2 * 8
    )  # of lora_A that reads, and lora_B that writes
    per_byte = found["held_bytes"]["all"] / found["lora_bytes"]
    assert found["held_bytes_per_lora_byte"] == pytest.approx(per_byte, abs=1e-3)
    assert found["ms_per_step"] > 0


def test_hooks_before_and_after_an_update_are_counted():
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: time.sleep(0.05))
    optimizer._optimizer_step_post_hooks.move_to_end(
        optimizer.register_step_post_hook(lambda *_: time.sleep(0.05)).id, last=False
    )
    timer = overhead.HookTimer(optimizer, overhead.Clock(torch.device("cpu"), cpu_time=False))
    assert timer.step() >= 0.1


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_linearity_is_the_exponent_of_depth(exponent):
    found = {stack.name: {"ms_per_step": 3 * stack.depths**exponent} for stack in overhead.STACKS}
    assert overhead.linearity(found) == exponent
