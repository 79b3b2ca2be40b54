"""Lightning and Fabric: `attach` sees through their wrappers, and serves the closure that Lightning always passes."""

from __future__ import annotations

import pytest
import torch

from structlora_trl import attach
from tests.support.tiny import FAMILIES, adamw, attached, peft_model, train

lightning = pytest.importorskip("lightning")


def tokens(seed):
    return FAMILIES["llama"].batch(seed)["input_ids"]


def expected(steps):
    model, optimizer, runtime = attached()
    train(model, "llama", optimizer, steps)
    return runtime.state_dict()


def assert_equals_a_bare_loop(runtime, steps):
    state = runtime.state_dict()
    for name, value in expected(steps).items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)


def test_fabric():
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = peft_model()
    model, optimizer = fabric.setup(model, adamw(model))
    runtime = attach(model, optimizer)
    model.train()
    for seed in range(3):
        fabric.backward(model(input_ids=tokens(seed), labels=tokens(seed)).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert_equals_a_bare_loop(runtime, 3)


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = peft_model()
        self.model.get_base_model().eval()  # as `from_pretrained` returns it; Lightning keeps each module's mode

    def training_step(self, batch, index):
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def validation_step(self, batch, index):
        self.model(input_ids=batch[0], labels=batch[0])

    def configure_optimizers(self):
        return adamw(self.model)

    def on_fit_start(self):
        self.runtime = attach(self.model, self.optimizers())


def test_trainer(tmp_path):
    module = Module()
    batches = torch.utils.data.DataLoader([tokens(seed) for seed in range(4)])
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, batches, batches)
    assert_equals_a_bare_loop(module.runtime, 4)


def test_fabric_in_mixed_precision():
    """Its autocast surrounds the forward: training weights are those of a forward outside, in fp32."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model = peft_model()
    model, optimizer = fabric.setup(model, adamw(model))
    runtime = attach(model, optimizer, coordinator_lr=0.3, side="both")
    twin, _, other = attached(coordinator_lr=0.3, side="both")
    model.train(), twin.train()
    for seed in range(3):
        fabric.backward(model(input_ids=tokens(seed), labels=tokens(seed)).loss)
        optimizer.step()
        optimizer.zero_grad()
    other.load_state_dict(runtime.state_dict())
    for each in (model, twin):
        each(input_ids=tokens(9))
    assert runtime.weights == other.weights == "training"
    for ours, theirs in zip(runtime.lora_parameters(), other.lora_parameters(), strict=True):
        assert torch.equal(ours, theirs)
