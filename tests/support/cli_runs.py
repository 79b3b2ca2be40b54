"""Runs of the command line on tiny models and data, and what every training run must leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from transformers import CLIPImageProcessor, LlavaProcessor

from structlora_trl.cli import main, train
from structlora_trl.state import STATE_NAME
from tests.support.tiny import FAMILIES, base_model, sentence, tokenizer

ROWS = 24
# On CPUs with AVX-512, bitsandbytes cannot lay out rows shorter than a block of 64.
BLOCKS_OF_64 = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
LEAST_MOVE = 1e-3  # of a gate logit in three steps at the default rate of 0.03
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


def turn(role: str, index: int) -> dict:
    return {"role": role, "content": sentence(index, 4)}


def texts() -> list[dict]:
    return [{"text": sentence(i)} for i in range(ROWS)]


def chats(folder: Path | None = None) -> list[dict]:
    return [{"messages": [turn("user", i), turn("assistant", i + 1)]} for i in range(ROWS)]


def preferences(folder: Path | None = None) -> list[dict]:
    return [
        {"prompt": [turn("user", i)], "chosen": [turn("assistant", i + 1)], "rejected": [turn("assistant", i + 2)]}
        for i in range(ROWS)
    ]


def pictures(folder: Path) -> list[dict]:
    """Rows that name their pictures by paths relative to the data file."""
    (folder / "pictures").mkdir(exist_ok=True)
    rows = []
    for i in range(ROWS):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
        rows.append(
            {"images": [f"pictures/{i}.png"], "prompt": [turn("user", i)], "completion": [turn("assistant", i + 1)]}
        )
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def llava_processor() -> LlavaProcessor:
    template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}{% endif %}{% endfor %}{% endif %} {% endfor %}"
    )
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def save_base(folder: Path, family: str = "llama", **sizes) -> None:
    model = base_model(family)
    if sizes:
        model = type(model)(type(model.config)(**{**model.config.to_dict(), **sizes}))
    model.save_pretrained(folder)
    (llava_processor() if family == "llava" else tokenizer()).save_pretrained(folder)


def command_line(options: dict) -> list[str]:
    """Options as `--name value`; a list gives several values."""
    words = []
    for name, value in options.items():
        words.append(f"--{name}")
        words += map(str, value) if isinstance(value, list) else [str(value)]
    return words


def trained(monkeypatch, method: str, *arguments: str):
    """Run a training command in this process; its trainer."""
    trainers, build = [], train._trainer

    def keep(*args):
        trainers.append(build(*args))
        return trainers[-1]

    monkeypatch.setattr(train, "_trainer", keep)
    code = main([method, *arguments])
    monkeypatch.setattr(train, "_trainer", build)
    assert code == 0
    return trainers[0]


def state_of(folder) -> tuple[dict, dict[str, torch.Tensor]]:
    """Options and tensors of the state in a folder."""
    with safe_open(Path(folder) / STATE_NAME, "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}


def assert_gates_moved(folder, steps: int = 3) -> None:
    options, state = state_of(folder)
    assert state["step"] == steps
    start = torch.tensor(options["gate_init"]).logit()
    logits = [value for key, value in state.items() if key.endswith("/filter.logits")]
    assert logits and all((value - start).abs().min() > LEAST_MOVE for value in logits)


@torch.no_grad()
def logits_of(model, family: str) -> torch.Tensor:
    batch = FAMILIES[family].batch(99)
    del batch["labels"]
    return model.eval()(**batch).logits.float()


def assert_plain_peft_agrees(trainer, folder, family: str = "llama") -> None:
    """The saved adapter, on the same base in plain PEFT, gives the logits of the model that was trained."""
    model = extract_model_from_parallel(trainer.model, keep_fp32_wrapper=False).eval()
    base = model.get_base_model()
    how = (
        {"quantization_config": base.config.quantization_config} if hasattr(base.config, "quantization_config") else {}
    )
    fresh = type(base).from_pretrained(model.peft_config["default"].base_model_name_or_path, dtype=base.dtype, **how)
    loaded = PeftModel.from_pretrained(fresh, folder).eval()
    for ours, theirs in zip(loaded.parameters(), model.parameters()):
        ours.data = ours.data.to(theirs.dtype)
    torch.testing.assert_close(logits_of(loaded, family), logits_of(model, family), atol=1e-6, rtol=0)
