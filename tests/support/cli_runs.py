"""Runs of the command line on tiny models and data, and what every training run must leave behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trl
import yaml
from accelerate.utils import extract_model_from_parallel
from packaging.version import Version
from peft import PeftModel
from transformers import Trainer

from structlora_trl.cli import main
from structlora_trl.trainers import compat
from tests.support.tiny import FAMILIES

# What every tiny run needs beside a method's own arguments.
SETTINGS = {
    "model_name_or_path": "base",
    "output_dir": "out",
    "use_cpu": True,
    "bf16": False,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "report_to": "none",
    "save_strategy": "no",
}
SFT = {
    **SETTINGS,
    "dataset_name": "data.jsonl",
    "max_length": 32,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_modules": ["q_proj", "v_proj", "o_proj"],
}


def config_file(name: str = "run.yaml", **options) -> str:
    """A YAML file of a tiny SFT run in the working directory; its name."""
    Path(name).write_text(yaml.safe_dump({**SFT, **options}), encoding="utf-8")
    return name


def command_line(options: dict) -> list[str]:
    """Options as `--name value`; a list gives several values."""
    words = []
    for name, value in options.items():
        words.append(f"--{name}")
        words += map(str, value) if isinstance(value, list) else [str(value)]
    return words


def skip_where_trl_cannot(method: str) -> None:
    """TRL before 1.0 cannot import some of its own trainers beside transformers 5; the command says so."""
    try:
        compat.trl_script(method)
    except ImportError as error:
        if Version(trl.__version__) >= Version("1.0"):
            raise
        assert main([method]) == 1
        pytest.skip(str(error))


def trained(monkeypatch, method: str, *arguments: str):
    """Run a training command in this process; its trainer."""
    trainers, train = [], Trainer.train

    def keep(self, *args, **more):
        trainers.append(self)
        return train(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", keep)
        assert main([method, *arguments]) == 0
    return trainers[0]


@torch.no_grad()
def logits_of(model, family: str) -> torch.Tensor:
    batch = FAMILIES[family].batch(99)
    del batch["labels"]
    return model.eval()(**batch).logits.float()


# What `from_pretrained` must be told of a base model.
LOADED_WITH = ("num_labels", "quantization_config")


def assert_plain_peft_agrees(model, folder, family: str = "llama", merged=None) -> None:
    """The saved adapter, on the same base in plain PEFT, gives the logits of the model that was trained.

    Args:
        model (`nn.Module`): as it was trained.
        folder (`str` or `Path`): of the adapter.
        family (`str`, *optional*): of the model.
        merged (`str` or `Path`, *optional*): folder of a model with the adapter merged, as in `model` too, which is held to
            the same.
    """
    model = extract_model_from_parallel(model, keep_fp32_wrapper=False).eval()
    base = model.get_base_model()
    how = {name: getattr(base.config, name) for name in LOADED_WITH if hasattr(base.config, name)}
    name = model.peft_config["default"].base_model_name_or_path
    fresh = type(base).from_pretrained(name, dtype=base.dtype, **how)
    fresh.config.pad_token_id = getattr(base.config, "pad_token_id", None)
    loaded = PeftModel.from_pretrained(fresh, folder).eval()
    # PEFT loads adapters in fp32, TRL trains some in bf16: the same values, but other arithmetic.
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=merged is None):
        ours.data = ours.data.to(theirs.dtype)
    expected = logits_of(model, family)
    torch.testing.assert_close(logits_of(loaded, family), expected, atol=1e-6, rtol=0)
    if merged:  # W + sBA sums in another order
        found = logits_of(type(base).from_pretrained(merged), family)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
