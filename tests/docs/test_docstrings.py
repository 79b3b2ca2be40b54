"""Each public docstring has an example, and it runs."""

from __future__ import annotations

import doctest

import peft
import pytest
import trl
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset

import structlora_trl
from tests.support.tiny import FAMILIES, adamw, base_model, peft_model, sentence, tokenizer

PUBLIC = [name for name in structlora_trl.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", PUBLIC)
def test_example_in_docstring_runs(name, tmp_path):
    model = peft_model()
    # Imports DeepSpeed where it is installed, which prints a line the first time.
    extract_model_from_parallel(model)
    names = {
        **{public: getattr(structlora_trl, public) for public in PUBLIC},
        **{
            "LoraConfig": peft.LoraConfig,
            "get_peft_model": peft.get_peft_model,
            "SFTTrainer": trl.SFTTrainer,
        },
        **{
            "torch": __import__("torch"),
            "model": model,
            "optimizer": adamw(model),
            "base": base_model("llama"),
        },
        "batches": [FAMILIES["llama"].batch(i) for i in range(2)],
        "labels": 40,  # of these batches
        "tokenizer": tokenizer(),
        "dataset": Dataset.from_list([{"text": sentence(i)} for i in range(8)]),
        "arguments": trl.SFTConfig(
            str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True
        ),
        "folder": str(tmp_path),
    }
    docstring = getattr(structlora_trl, name).__doc__
    examples = doctest.DocTestParser().get_doctest(docstring, names, name, None, 0)
    assert examples.examples, f"{name} has no example"
    said: list[str] = []
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples, out=said.append)
    assert results.failed == 0, "".join(said)
