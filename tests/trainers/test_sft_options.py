"""Options of TRL's SFT that change batches or the graph: the callback acts, and the saved adapter is the evaluated one."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from structlora_trl import StructLoRACallback
from tests.support.jobs import sft
from tests.support.tiny import base_model, logits_of

# Activation offloading and Liger kernels need a GPU, context parallelism several.
OPTIONS = {
    "packing": {"packing": True},
    "packing, wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "padding-free": {"padding_free": True, "max_length": None},
    "padding-free packing": {"packing": True, "padding_free": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option_of_sft(name, tmp_path):
    callback = StructLoRACallback()
    trainer = sft(tmp_path, [callback], **OPTIONS[name])
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    assert callback.runtime.step == 3
    trained = logits_of(trainer.model, "llama")
    loaded = logits_of(PeftModel.from_pretrained(base_model("llama"), tmp_path / "adapter"), "llama")
    torch.testing.assert_close(loaded, trained, atol=1e-6, rtol=0)
    assert not torch.equal(trained, logits_of(base_model("llama"), "llama"))
