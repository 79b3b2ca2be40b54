"""The suite's vision backbone: a small ViT of 12 layers, trained from scratch on Fashion-MNIST's classes 0 to 5.

Classes 6 to 9 (shirt, sneaker, bag, ankle boot) and all digits stay unseen, so that adapting to them is real work. Takes a
few minutes on one core; the weights go to the cache, never into git.

    python -m benchmarks.quality.pretrain
"""

from __future__ import annotations

import hashlib
import json
import os
import time

import torch
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

from . import assets

RECIPE = {
    "classes": 6,
    "steps": 2000,
    "batch": 64,
    "learning_rate": 1e-3,
    "warmup": 50,
    "weight_decay": 0.05,
    "seed": 0,
}
SHAPE = {
    "image_size": 28,
    "patch_size": 7,
    "num_channels": 1,
    "hidden_size": 96,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def to_pixels(images) -> torch.Tensor:
    """(n, 28, 28) of 0 to 255 -> (n, 1, 28, 28) fp32 of about unit scale."""
    return (torch.as_tensor(images, dtype=torch.float32)[:, None] / 255 - 0.29) / 0.35


def build(labels: int) -> ViTForImageClassification:
    """An untrained model with `labels` outputs."""
    return ViTForImageClassification(ViTConfig(**SHAPE, num_labels=labels))


def backbone() -> dict[str, torch.Tensor]:
    """The pre-trained weights without the head, from the cache; trained first where they are not there."""
    path = assets.CACHE / f"vit-fashion-0-5-{RECIPE['steps']}.pt"
    if path.exists():
        stored = torch.load(path)
        if stored["recipe"] == json.dumps([RECIPE, SHAPE]):
            return stored["weights"]
    weights = _train()
    torch.save({"recipe": json.dumps([RECIPE, SHAPE]), "weights": weights}, f"{path}.unfinished")
    os.replace(f"{path}.unfinished", path)
    return weights


def fingerprint() -> str:
    """Twelve digits that tell a backbone from others. Another processor, or another PyTorch, trains another one."""
    digest = hashlib.sha256()
    for name, value in sorted(backbone().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()[:12]


def _train() -> dict[str, torch.Tensor]:
    steps = RECIPE["steps"]
    torch.set_num_threads(1)  # sums in one order, however many cores there are
    torch.manual_seed(RECIPE["seed"])
    data = assets.fashion()
    known = data["train_y"] < RECIPE["classes"]
    pixels, labels = to_pixels(data["train_x"][known]), torch.from_numpy(data["train_y"][known].astype(int))
    known = data["test_y"] < RECIPE["classes"]
    test_pixels, test_labels = (
        to_pixels(data["test_x"][known]),
        torch.from_numpy(data["test_y"][known].astype(int)),
    )
    model = build(RECIPE["classes"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RECIPE["learning_rate"], weight_decay=RECIPE["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / RECIPE["warmup"], (steps - i) / (steps - RECIPE["warmup"])),
    )
    started = time.perf_counter()
    for step in range(steps):
        chosen = torch.randint(len(labels), (RECIPE["batch"],))
        loss = cross_entropy(model(pixel_values=pixels[chosen]).logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(
                f"pre-training {step + 1}/{steps}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    model.eval()
    with torch.inference_mode():
        predicted = torch.cat([model(pixel_values=part).logits.argmax(1) for part in test_pixels.split(256)])
    print(
        f"accuracy on the six classes' test images: {100 * (predicted == test_labels).float().mean():.1f} %",
        flush=True,
    )
    return {name: value for name, value in model.state_dict().items() if not name.startswith("classifier.")}


if __name__ == "__main__":
    backbone()
