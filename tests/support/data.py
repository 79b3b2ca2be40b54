"""Tiny models and data as users have them: in folders and files, in the formats of TRL."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor, LlavaProcessor

from tests.support.tiny import base_model, sentence, tokenizer

ROWS = 24
# On CPUs with AVX-512, bitsandbytes cannot lay out rows shorter than a block of 64.
BLOCKS_OF_64 = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}


def turn(role: str, index: int) -> dict:
    return {"role": role, "content": sentence(index, 4)}


def texts() -> list[dict]:
    return [{"text": sentence(i)} for i in range(ROWS)]


def chat(index: int) -> dict:
    return {"messages": [turn("user", index), turn("assistant", index + 1)]}


def chats(count: int = ROWS) -> list[dict]:
    return [chat(i) for i in range(count)]


def preferences(count: int = ROWS) -> list[dict]:
    """Two whole chats that begin alike, as the public data sets have them."""
    return [
        {
            "chosen": [turn("user", i), turn("assistant", i + 1)],
            "rejected": [turn("user", i), turn("assistant", i + 2)],
        }
        for i in range(count)
    ]


def better_and_worse(count: int = ROWS) -> list[dict]:
    """Pairs of texts."""
    return [{"chosen": sentence(i), "rejected": sentence(i + 1)} for i in range(count)]


def labelled(count: int = ROWS) -> list[dict]:
    """Completions that are good or bad, each by itself."""
    return [
        {"prompt": sentence(i, 4), "completion": " " + sentence(i + 1, 4), "label": i % 2 == 0}
        for i in range(count)
    ]


def prompts(count: int = ROWS) -> list[dict]:
    return [{"prompt": sentence(i, 4)} for i in range(count)]


def distinct_words(completions: list[str], **_) -> list[float]:
    """A reward function: the words that differ, and a little for length, so that no two are alike by chance."""
    return [float(len({*text.split()})) + 0.1 * len(text) for text in completions]


def picture(index: int) -> np.ndarray:
    """Pixels, (16, 16, 3)."""
    return np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)


def pictures(count: int = ROWS) -> list[dict]:
    """Rows that hold their pictures."""
    return [
        {"images": [picture(i)], "prompt": [turn("user", i)], "completion": [turn("assistant", i + 1)]}
        for i in range(count)
    ]


def save_pictures(folder: Path) -> None:
    """A folder of pictures as `datasets` reads it: `file_names` of metadata.jsonl become the column `images`."""
    folder.mkdir(parents=True)
    rows = pictures()
    for i, row in enumerate(rows):
        Image.fromarray(row.pop("images")[0]).save(folder / f"{i}.png")
        row["file_names"] = [f"{i}.png"]
    write_rows(folder / "metadata.jsonl", rows)


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


def save_base(folder: Path, family: str = "llama", **sizes) -> str:
    """A tiny model of a family with its tokenizer or processor, as a local folder; its path."""
    model = base_model(family)
    if sizes:
        torch.manual_seed(0)
        model = type(model)(type(model.config)(**{**model.config.to_dict(), **sizes}))
    # Public BERT checkpoints have no classifier.
    (model.bert if family == "bert" else model).save_pretrained(folder)
    (llava_processor() if family == "llava" else tokenizer()).save_pretrained(folder)
    return str(folder)
