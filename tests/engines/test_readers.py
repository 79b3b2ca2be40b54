"""Readers within a step, and weights that others write, where parameters are sharded: FSDP2 in one process, or as told."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.support.launching import one_at_a_time, said_by, torchrun
from tests.support.tiny import attached, logits_of, lora_parameters, loss_of, peft_model, train

CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def trained(mesh, reads: bool):
    model = peft_model()
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    model, optimizer, runtime = attached(fully_shard(model, mesh=mesh))
    model.train()
    for seed in range(3):
        loss = loss_of(model, "llama", seed)
        if reads:
            logits_of(model, "llama")
        loss.backward()
        if reads:
            logits_of(model, "llama")
        optimizer.step()
        optimizer.zero_grad()
    return model, runtime


def latents(runtime) -> dict[str, torch.Tensor]:
    return {name: value for name, value in runtime.state_dict().items() if "latent" in name}


def after_a_training_forward(model) -> torch.Tensor:
    model.train()
    loss_of(model, "llama", 7)
    return logits_of(model, "llama")


def test_readers_within_a_step_and_weights_that_others_write(mesh):
    undisturbed = latents(trained(mesh, reads=False)[1])
    model, runtime = trained(mesh, reads=True)
    torch.testing.assert_close(latents(runtime), undisturbed, **CLOSE)
    before = logits_of(model, "llama")
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.mul_(0.5)
    written = logits_of(model, "llama")
    assert (written - before).abs().max() > 0.01
    runtime.reload()
    torch.testing.assert_close(after_a_training_forward(model), written, **CLOSE)
    after_a_training_forward(model)  # training weights stand
    shown = {name: value for name, value in model.state_dict().items() if "lora" in name}
    model.load_state_dict(shown, strict=False)
    runtime.reload()
    torch.testing.assert_close(after_a_training_forward(model), written, **CLOSE)


@one_at_a_time
def test_a_write_to_one_ranks_shard_stops_all_ranks():
    """The others would wait in a collective: what they have is as they left it."""
    said = said_by("written_job", *torchrun(2))
    assert said.keys() == {"ZeRO-3", "FSDP2"}
    for engine, messages in said.items():
        assert all("reload" in message for message in messages), (engine, messages)


def test_a_step_without_a_backward(mesh):
    """FSDP2 leaves the root gathered after a forward: a caller that skips the backward steps then."""
    model, optimizer, runtime = attached(fully_shard(peft_model("llama", "warm"), mesh=mesh))
    before = latents(runtime)
    model.train()
    loss_of(model, "llama", 0)
    optimizer.step()
    torch.testing.assert_close(latents(runtime), before, **CLOSE)


def test_a_detached_runtime_does_not_keep_the_model(mesh):
    """Sharded as a whole: of a model with sharded layers, FSDP2 itself keeps the last one that ran."""
    model, optimizer, runtime = attached(fully_shard(peft_model(), mesh=mesh))
    train(model, "llama", optimizer, 2)
    runtime.detach()
    let_go = weakref.ref(model), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [reference() for reference in let_go] == [None, None]
    assert runtime.metrics() and latents(runtime) and runtime.engine.read_working()
