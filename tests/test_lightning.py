"""Lightning and Fabric: `attach` sees through their wrappers, and serves the closure that Lightning always passes."""

from __future__ import annotations

import pytest
import torch

from structlora_trl import attach
from tests.support.tiny import DATA, FAMILIES, adamw, assert_same, attached, peft_model, train, weights_of

lightning = pytest.importorskip("lightning")


def tokens(seed):
    return FAMILIES["llama"].batch(seed)["input_ids"]


def assert_equals_a_bare_loop(runtime, steps, autocast=None):
    model, optimizer, other = attached()
    train(model, "llama", optimizer, steps, autocast=autocast)
    state = runtime.state_dict()
    assert runtime.step == steps and len(runtime.gating) == len(other.gating)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision, autocast", [("32-true", None), ("bf16-mixed", torch.bfloat16)])
def test_fabric(precision, autocast):
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    model = peft_model()
    model, optimizer = fabric.setup(model, adamw(model))
    runtime = attach(model, optimizer, **DATA)
    model.train()
    for seed in range(3):
        torch.manual_seed(seed)  # as the bare loop
        fabric.backward(model(input_ids=tokens(seed), labels=tokens(seed)).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert_equals_a_bare_loop(runtime, 3, autocast)


class Module(lightning.LightningModule):
    """As the page of checkpoints has it."""

    def __init__(self):
        super().__init__()
        self.model = peft_model()

    def training_step(self, batch, index):
        self.model.train()
        torch.manual_seed(index)  # as the bare loop
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def validation_step(self, batch, index):
        self.model(input_ids=batch[0], labels=batch[0])

    def configure_optimizers(self):
        optimizer = adamw(self.model)
        self.runtime = attach(self.model, optimizer, **DATA)
        return optimizer

    def on_save_checkpoint(self, checkpoint):
        checkpoint["structlora"] = self.runtime.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.state = checkpoint["structlora"]

    def on_train_start(self):
        if hasattr(self, "state"):
            self.runtime.load_state_dict(self.state)


def fit(module, folder, passes: int = 1, **options):
    batches = torch.utils.data.DataLoader([tokens(seed) for seed in range(4)])
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = lightning.Trainer(max_epochs=passes, accelerator="cpu", default_root_dir=folder, **quiet)
    trainer.fit(module, batches, batches, **options)
    return trainer


def test_trainer(tmp_path):
    module = Module()
    fit(module, tmp_path)
    assert_equals_a_bare_loop(module.runtime, 4)


def test_a_run_goes_on_from_lightnings_checkpoint(tmp_path):
    whole, first, second = Module(), Module(), Module()
    fit(whole, tmp_path, passes=2)
    fit(first, tmp_path).save_checkpoint(tmp_path / "one.ckpt")
    fit(second, tmp_path, passes=2, ckpt_path=tmp_path / "one.ckpt", weights_only=False)
    assert second.runtime.step == 8
    assert_same(weights_of(whole.model), weights_of(second.model))
    assert_same(whole.runtime.state_dict(), second.runtime.state_dict())
