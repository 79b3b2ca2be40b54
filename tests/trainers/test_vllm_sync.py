"""What TRL's trainers send to vLLM is the adapter that stands between steps: merged, or alone (TRL's pull request 6007).


vLLM needs a GPU. The sync is TRL's own; a stub stands where vLLM would receive the weights.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from structlora_trl import StructLoRACallback
from tests.support.jobs import JOBS, sft
from tests.support.tiny import assert_same, base_model, evaluation_factors, weights_of

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


class Sends(TrainerCallback):
    """Sends where generation may come, between steps and while a backward is still due; keeps what was sent beside what
    should be.
    """

    def __init__(self, send, structlora: StructLoRACallback):
        self.send, self.structlora, self.seen = send, structlora, []

    def _send(self, args, state, control, model=None, **kwargs):
        self.seen.append((self.send(model), evaluation_factors(self.structlora.runtime)))

    on_step_begin = on_substep_end = on_step_end = _send


def received_by_vllm(mode: str, model) -> dict:
    generation = object.__new__(vllm_generation.VLLMGeneration)
    received = Received()
    generation.model, generation.mode, generation._weight_metadata = model, mode, None
    generation.accelerator = SimpleNamespace(is_main_process=True)
    generation._dist = SimpleNamespace(gather_params=lambda _: torch.no_grad(), is_fsdp=False)
    generation.vllm_client = generation.llm = received
    generation.enable_sleep_mode = False
    generation.sync_weights()
    return received.weights


@pytest.mark.parametrize("name, mode", [("grpo", "server"), ("rloo", "colocate")])
def test_vllm_receives_the_merged_adapter(name, mode, tmp_path):
    callback = StructLoRACallback()
    sync = Sends(partial(received_by_vllm, mode), callback)
    trainer = JOBS[name](tmp_path, [callback, sync])
    trainer.train()
    lora = trainer.model.peft_config["default"]
    base = dict(base_model("llama").named_parameters())
    assert len(sync.seen) == 6
    for weights, factors in sync.seen:
        assert weights.keys() == base.keys()
        for kind, (A, B) in zip(callback.runtime.kinds, factors, strict=True):
            for module, a, b in zip(kind.modules, A, B, strict=True):
                name = f"{module.removeprefix('base_model.model.')}.weight"
                merged = base[name] + lora.lora_alpha / lora.r * b @ a
                torch.testing.assert_close(weights[name], merged, atol=1e-6, rtol=1e-5)
    first, last = sync.seen[0][0], sync.seen[-1][0]
    assert any(not torch.equal(first[parameter], last[parameter]) for parameter in first)


def test_async_grpo_publishes_the_adapter(tmp_path):
    """Also where there are gates; and training goes on as without it."""
    module = pytest.importorskip("trl.experimental.async_grpo.async_grpo_trainer")
    if not hasattr(module, "save_lora_adapter"):
        pytest.skip("this TRL publishes merged weights alone")
    alone = SimpleNamespace(device=torch.device("cpu"), is_main_process=True)

    def publish(model) -> dict:
        module.save_lora_adapter(model, alone, "default", str(tmp_path / "published"))
        return load_file(tmp_path / "published" / "adapter_model.safetensors")

    ends, callback = [], StructLoRACallback()
    publishes = Sends(publish, callback)
    for callbacks in ([callback, publishes], [StructLoRACallback()]):
        trainer = sft(tmp_path, callbacks, gradient_accumulation_steps=2, max_steps=2)
        trainer.train()
        ends.append(weights_of(trainer.model))
    assert_same(*ends)
    assert callback.runtime.gating and len(publishes.seen) == 6
    for sent, factors in publishes.seen:
        for kind, (A, B) in zip(callback.runtime.kinds, factors, strict=True):
            for module, a, b in zip(kind.modules, A, B, strict=True):
                assert torch.equal(sent[f"{module}.lora_A.weight"], a)
                assert torch.equal(sent[f"{module}.lora_B.weight"], b)
