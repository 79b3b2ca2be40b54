"""PEFT's own comparison runs StructLoRA: its real `run.py`, offline, on a tiny model and a CPU.

The suite is in no release of PEFT. `PEFT_CHECKOUT=/path/to/peft make test-all` runs this on a checkout; see PINNED.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks.method_comparison import run
from benchmarks.method_comparison.run import PINNED, copy_experiment
from structlora_trl import StructLoRAConfig, attach
from tests.support.launching import ROOT
from tests.support.tiny import peft_model

pytestmark = pytest.mark.slow

CHECKOUT = os.environ.get("PEFT_CHECKOUT")

# The suite refuses CPUs, asks the hub for what it measures, and expects sentences on which the base model has a loss of
# 1 to 2 nats, which a model of five words has from the start.
ON_CPU = """
import sys, types
import datasets, peft, peft.utils, torch
from datasets import Dataset, DatasetDict

peft.utils.infer_device = lambda: "cuda"
sys.path.insert(0, sys.argv[1])
import utils  # of the suite

utils.device = "cpu"
peft.utils.infer_device = utils.infer_device = lambda: "cpu"
for name in ("reset_peak_memory_stats", "manual_seed_all", "empty_cache"):
    setattr(torch.cpu, name, lambda *_: None)
for name in ("max_memory_reserved", "memory_allocated", "memory_reserved"):
    setattr(torch.cpu, name, lambda *_: 0)
torch.cpu.get_device_name = lambda *_: "CPU"

question = {"query": "w0 w1", "response": "w2 The answer is: 3"}
math = DatasetDict(train=Dataset.from_list([{**question, "type": "a", "original_question": "w0"}] * 40))
school = Dataset.from_list([{"question": "w0 w1", "answer": "w2 #### 3"}] * 60)
wiki = types.SimpleNamespace(take=lambda count: [{"text": "w0 w1 w2"}] * 4)
known = {"meta-math/MetaMathQA": math, "openai/gsm8k": DatasetDict(train=school, test=school.select(range(4)))}
datasets.load_dataset = lambda name, *_, **__: known.get(name, wiki)

from benchmarks.method_comparison.run import main
main([sys.argv[1], "lora/tiny", "beta=0.5", "--clean"])
"""


def save_tiny_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<eos>", "<unk>", "w0", "w1", "w2"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>").save_pretrained(
        folder
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=5, num_key_value_heads=2, **sizes)).save_pretrained(folder)


def test_experiment_is_copied_with_its_options(tmp_path):
    lora = tmp_path / "experiments" / "lora" / "tiny"
    lora.mkdir(parents=True)
    (lora / "adapter_config.json").write_text("{}")
    path = tmp_path / copy_experiment(tmp_path, "lora/tiny", StructLoRAConfig(beta=0.5))
    assert (
        path.parts[-3:] == ("experiments", "structlora", "tiny") and (path / "adapter_config.json").is_file()
    )
    assert json.loads((path / "structlora.json").read_text())["beta"] == 0.5
    with pytest.raises(SystemExit, match=r"No experiment .*missing.*: tiny"):
        copy_experiment(tmp_path, "lora/missing", StructLoRAConfig())


def test_the_suites_script_attaches_with_what_its_run_will_see(monkeypatch):
    """On a script that has the suite's two functions, which no release of PEFT has."""
    model = peft_model("llama", "fresh", rank=2)
    found = []

    def get_optimizer_and_scheduler(model, *, max_steps, lr):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr), None

    def train(*, model, max_steps, batch_size):
        return script.get_optimizer_and_scheduler(model, max_steps=max_steps, lr=1e-3)

    script = types.SimpleNamespace(train=train, get_optimizer_and_scheduler=get_optimizer_and_scheduler)
    monkeypatch.setattr(run, "attach", lambda *given, **data: found.append((attach(*given, **data), data)))
    run.attach_to(script, StructLoRAConfig(beta=0.5), labels=100)
    script.train(model=model, max_steps=50, batch_size=4)
    ((runtime, data),) = found
    assert data == {"examples": 20_000, "batch_size": 400} and runtime.config.beta == 0.5
    runtime.detach()


@pytest.mark.skipif(
    not CHECKOUT, reason=f"PEFT_CHECKOUT names no checkout of huggingface/peft at {PINNED[:8]}"
)
def test_metamath_suite(tmp_path):
    suite = tmp_path / "peft" / "method_comparison" / "MetaMathQA"
    shutil.copytree(Path(CHECKOUT) / "method_comparison" / "MetaMathQA", suite)
    for results in ("results", "temporary_results", "cancelled_results"):
        (suite / results).mkdir(exist_ok=True)
    save_tiny_model(tmp_path / "model")
    lora = suite / "experiments" / "lora" / "tiny"
    lora.mkdir()
    config = json.loads(
        (suite / "experiments" / "lora" / "llama-3.2-3B-rank32" / "adapter_config.json").read_text()
    )
    (lora / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    training = {"model_id": str(tmp_path / "model"), "dtype": "float32", "max_steps": 4, "eval_steps": 2}
    training |= {"generation_kwargs": {"max_new_tokens": 2}}
    (lora / "training_params.json").write_text(json.dumps(training))
    # It asks git for the branch of PEFT; of an installed one there is none.
    (tmp_path / "git").write_text("#!/bin/sh\necho a-branch\n")
    (tmp_path / "git").chmod(0o755)

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", ON_CPU, str(suite)], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "StructLoRA on torch, 1 process" in done.stderr
    (result,) = (suite / "temporary_results").glob("structlora--tiny--*.json")
    facts = json.loads(result.read_text())
    assert facts["train_info"]["status"] == "success", facts["run_info"]["error_msg"]
    assert "test accuracy" in facts["train_info"]["metrics"][-1]
