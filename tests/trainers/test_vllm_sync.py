"""What TRL's online trainers send to vLLM is the evaluation adapter, merged, in server and in colocated mode.


vLLM needs a GPU. The sync is TRL's own; a stub stands where vLLM would receive the weights.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from structlora_trl import StructLoRACallback
from tests.support.jobs import JOBS
from tests.support.tiny import base_model

vllm_generation = pytest.importorskip("trl.generation.vllm_generation")


class Received:
    """Stands for both of vLLM's ends: the client of a server, and the engine in the process."""

    def __init__(self):
        self.weights: dict[str, torch.Tensor] = {}
        model = SimpleNamespace(load_weights=self.take)
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=model))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def take(self, named) -> None:
        self.weights |= {name: weight.detach().clone() for name, weight in named}

    def update_named_params(self, metadata, named) -> None:
        self.take(named)

    def reset_prefix_cache(self) -> None:
        pass


class SyncAtEvents(TrainerCallback):
    """Runs TRL's sync where generation may come, and keeps what vLLM would hold beside what it should."""

    def __init__(self, mode: str, structlora: StructLoRACallback):
        self.mode, self.structlora, self.seen = mode, structlora, []

    def sync(self, model):
        generation = object.__new__(vllm_generation.VLLMGeneration)
        received = Received()
        generation.model, generation.mode, generation._weight_metadata = model, self.mode, None
        generation.accelerator = SimpleNamespace(is_main_process=True)
        generation._dist = SimpleNamespace(gather_params=lambda _: torch.no_grad(), is_fsdp=False)
        generation.vllm_client = generation.llm = received
        generation.enable_sleep_mode = False
        generation.sync_weights()
        self.seen.append((received.weights, self.structlora.runtime.evaluation_factors()))

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.sync(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.sync(model)


@pytest.mark.parametrize("mode", ["server", "colocate"])
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_vllm_receives_the_evaluation_adapter(name, mode, tmp_path):
    callback = StructLoRACallback()
    sync = SyncAtEvents(mode, callback)
    trainer = JOBS[name](tmp_path, [callback, sync])
    trainer.train()
    base = dict(base_model("llama").named_parameters())
    scale = trainer.model.peft_config["default"].lora_alpha / trainer.model.peft_config["default"].r
    assert len(sync.seen) == 6
    for weights, factors in sync.seen:
        assert weights.keys() == base.keys()
        for kind, (A, B) in zip(callback.runtime.kinds, factors, strict=True):
            for module, a, b in zip(kind.modules, A, B, strict=True):
                parameter = f"{module.removeprefix('base_model.model.')}.weight"
                merged = base[parameter] + scale * b @ a
                torch.testing.assert_close(weights[parameter], merged, atol=1e-6, rtol=1e-5)
    first, last = sync.seen[0][0], sync.seen[-1][0]
    assert any(not torch.equal(first[parameter], last[parameter]) for parameter in first)
