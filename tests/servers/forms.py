"""Adapters that PEFT trains, each form of them that `structlora export` writes, and what plain PEFT computes with one."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from structlora_trl.errors import StructLoRAError
from structlora_trl.shrink.export import export
from structlora_trl.shrink.load_adapter import read_saved
from structlora_trl.shrink.servers import told

RANK, TOKENS = 16, 8
TEXTS = ["The capital of France is Paris, and the", "Once upon a time there was a small"]
ROWS = [{"prompt": "Review: a fine film\nSentiment:", "completion": " positive"}] * 4
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Adapters that PEFT trains -> LoRA's options
TRAINED = {
    "plain": {},
    "patterns": {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"q_proj": 8}, "use_rslora": True},
    "closed": {},  # half of its directions, and one kind of modules, as `keep` does while training
    "embeddings": {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]},
    "dora": {"use_dora": True},
    "heads": {"modules_to_save": ["lm_head"]},
    "biases": {"lora_bias": True, "target_modules": ["q_proj"]},
}
REFUSED = ("dora", "heads", "biases")  # by every server
# What is served -> the adapter it is made of, options of `export` (None: as PEFT saved it)
FORMS = {
    "as-peft-saved-it": ("plain", None),
    "one-rank": ("plain", {"rank": 4, "data": ROWS}),
    "one-rank-distilled": ("plain", {"rank": 4, "data": ROWS, "distil": 2}),
    "a-quarter-of-many-ranks": ("plain", {"keep": 0.25, "data": ROWS}),
    "a-quarter-filled-up": ("plain", {"keep": 0.25, "max_rank": 8, "server": "sglang", "data": ROWS}),
    "for-vllm": ("patterns", {"server": "vllm"}),
    "for-llamacpp": ("patterns", {"server": "llamacpp", "dtype": "bfloat16"}),
    "scaled": ("plain", {"scale": 0.7}),
    "pruned": ("closed", {"prune": True}),
    "pruned-for-lorax": ("closed", {"prune": True, "server": "lorax"}),
    "for-lorax": ("patterns", {"server": "lorax"}),
    "with-embeddings": ("embeddings", {"server": "vllm"}),
    "bfloat16": ("plain", {"rank": 8, "dtype": "bfloat16"}),
}


def write(base: Path, folder: Path) -> None:
    """Every adapter and every form, each in a folder of its name."""
    for name, options in TRAINED.items():
        torch.manual_seed(0)
        lora = LoraConfig(
            **{"r": RANK, "lora_alpha": RANK, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **options}
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
        for key, parameter in model.named_parameters():
            if "lora_B" in key and parameter.ndim > 1:  # of falling sizes, as after training
                parameter.data.normal_().mul_(0.12 * torch.logspace(0, -1.5, parameter.shape[1]))
                if name == "closed":
                    parameter.data[:, 0 if "k_proj" in key else RANK // 2 :] = 0
            if "lora_embedding_A" in key:  # which begins at zero, as lora_B does
                parameter.data.normal_().mul_(0.01)
        model.save_pretrained(folder / name)
    for form, (name, options) in FORMS.items():
        if options is not None:
            export(read_saved(folder / name), folder / form, **options)
    (folder / "as-peft-saved-it").symlink_to(folder / "plain")


def prompts(base: Path) -> dict[str, list[int]]:
    """Text -> its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    return {text: tokenizer(text).input_ids for text in TEXTS}


def ask(address: str, body: dict) -> str:
    """What a server answers to a request with a body of JSON."""
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as reply:
        return reply.read().decode()


def served_two_at_once(names: tuple[str, ...], serve: Callable) -> dict[str, dict]:
    """Name -> text -> what `serve(name, text)` gives."""
    pairs = [(name, text) for text in TEXTS for name in names]  # neighbours are of different adapters
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(pairs, pool.map(lambda pair: serve(*pair), pairs), strict=True))
    return {name: {text: found[name, text] for text in TEXTS} for name in names}


def assert_refused(adapter: Path, server: str, called: str) -> None:
    """For a server that cannot load the adapter, `export` writes nothing, and says so."""
    saved = read_saved(adapter)
    with pytest.raises(StructLoRAError, match=f"what {called} loads"):
        export(saved, adapter / "out", server=server)
    assert "cannot load" in told(saved.lora, saved.tensors)[called]


@torch.no_grad()
def in_peft(base: Path, adapter: Path, found: dict) -> tuple[dict, dict]:
    """Text -> log-probabilities in plain PEFT of the tokens that a server found, with the adapter and without.

    Args:
        found (`dict`): text -> tokens that continue it, and their log-probabilities on the server.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model, ids = PeftModel.from_pretrained(model, adapter).eval(), prompts(base)

    def logs(text: str) -> list[float]:
        tokens, start = found[text][0], len(ids[text]) - 1
        logits = model(input_ids=torch.tensor([ids[text] + tokens])).logits[0, start:-1]
        return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()

    with_adapter = {text: logs(text) for text in found}
    with model.disable_adapter():
        return with_adapter, {text: logs(text) for text in found}


def difference(found: dict, wanted: dict) -> float:
    """The largest one between the log-probabilities of a server and others of the same tokens."""
    return max(abs(a - b) for text in found for a, b in zip(found[text][1], wanted[text], strict=True))
