"""What LoRA is trained with on a GPU: flash attention, torch.compile, quantised bases, bitsandbytes' optimizers, fused kernels."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from structlora_trl import attach
from tests.support.promises import keep_promises
from tests.support.setups import SETUPS, llama, lora, quantised
from tests.support.tiny import DATA, FAMILIES, lora_parameters, train, warm_up

pytestmark = pytest.mark.cuda
slow = pytest.mark.slow

STEPS = 4
ROWS = {row.name: row for rows in SETUPS.values() for row in rows}
FP32, BF16 = 1e-3, 1e-1  # largest distance between two ends, relative to the way there


def model_on(device: str, dtype: torch.dtype = torch.float32, **options):
    """A tiny LLaMA under a warm adapter on all its linear modules."""
    model = get_peft_model(llama(**options).to(dtype), lora(target_modules=FAMILIES["llama"].linear))
    warm_up(model)
    return model.to(device)


def way(model, forward=None) -> torch.Tensor:
    """From where the weights start to where a run ends. SGD, so that a small difference of gradients stays small."""
    optimizer = torch.optim.SGD(lora_parameters(model).values(), lr=0.1)
    runtime = attach(model, optimizer, **DATA)

    def weights() -> torch.Tensor:
        return torch.cat([p.detach().flatten().float() for p in runtime.lora_parameters()])

    start = weights()
    train(model if forward is None else forward, "llama", optimizer, STEPS)
    assert (runtime.step, runtime.skipped_steps) == (STEPS, 0)
    return weights() - start


def assert_same_way(found: torch.Tensor, expected: torch.Tensor, tolerance: float, record_property) -> None:
    distance = ((found - expected).norm() / expected.norm()).item()
    record_property("relative distance between the two ends", distance)
    assert distance <= tolerance


def test_flash_attention_of_pytorch(device, record_property):
    ways = {}
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):  # an error where that kernel cannot run
            ways[backend] = way(model_on(device, torch.bfloat16))
    assert_same_way(ways[SDPBackend.FLASH_ATTENTION], ways[SDPBackend.MATH], BF16, record_property)


def test_flash_attn_package(only_on_gpu, device, record_property):
    only_on_gpu("flash-attn")
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    found = way(model_on(device, torch.bfloat16, attn_implementation="flash_attention_2"))
    assert_same_way(found, way(model_on(device, torch.bfloat16)), BF16, record_property)


def test_torch_compile(device, record_property):
    # The latter compiles no kernels, and takes seconds.
    backend = "inductor" if device == "cuda" else "aot_eager"
    record_property("backend", backend)
    model = model_on(device)
    found = way(model, torch.compile(model, backend=backend))
    assert_same_way(found, way(model_on(device)), FP32, record_property)


def test_fused_lora_kernels_of_axolotl(device, monkeypatch, record_property):
    for package in ("axolotl", "triton"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from tests.cuda import axolotl_kernels

    if device == "cpu":  # the activation kernels allocate their output on "cuda" by name
        empty = torch.empty
        monkeypatch.setattr(
            torch,
            "empty",
            lambda *a, device=None, **o: empty(*a, device=None if device == "cuda" else device, **o),
        )
    model = model_on(device)
    assert axolotl_kernels.patch(model) == FAMILIES["llama"].build().config.num_hidden_layers
    assert_same_way(way(model), way(model_on(device)), FP32, record_property)


@pytest.mark.parametrize(
    "name",
    [
        "4-bit base (QLoRA)",
        *(pytest.param(n, marks=slow) for n in ("8-bit base", "8-bit AdamW", "paged AdamW", "fused AdamW")),
    ],
)
def test_set_up(name, device, deterministic, tmp_path):
    """The promises of `tests/test_setups.py`: evaluation, saving, resuming, switching off."""
    row = ROWS[name]
    if name.endswith(("base (QLoRA)", "8-bit base")):
        row = replace(row, base=partial(quantised, int(name[0]), device))
    keep_promises(row.on(device), tmp_path)
