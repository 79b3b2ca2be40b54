"""The tag and the section in every model card: on save, in checkpoints, and on the hub."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from structlora_trl import StructLoRACallback, attach
from structlora_trl.model_card import HEADING, TAG
from tests.support.hub import Hub
from tests.support.jobs import plain, sft
from tests.support.launching import ROOT
from tests.support.tiny import adamw, peft_model


def check(text: str, option: str = "gate_init=0.8") -> None:
    card = ModelCard(text)
    assert TAG in card.data.tags
    assert text.count(HEADING) == 1 and option in text and "plain LoRA adapter" in text


@pytest.mark.parametrize("job", [sft, plain])
def test_cards_of_a_trainer(job, tmp_path):
    trainer = job(tmp_path, [StructLoRACallback(gate_init=0.8)], save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    trainer.create_model_card()
    trainer.create_model_card()
    for folder in ("checkpoint-3", "final", "."):
        check((tmp_path / folder / "README.md").read_text())


def test_card_of_a_loop_and_of_a_copy(tmp_path):
    model = peft_model()
    attach(model, adamw(model), gate_init=0.8)
    for name, holder in {"model": model, "copy": copy.deepcopy(model)}.items():
        holder.save_pretrained(tmp_path / name)
        holder.save_pretrained(tmp_path / name)
        check((tmp_path / name / "README.md").read_text())


def test_text_around_the_section_is_kept(tmp_path):
    model = peft_model()
    attach(model, adamw(model))
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\n## My notes\n\nKeep this.\n")
    model.save_pretrained(tmp_path)
    text = card.read_text()
    assert text.count("Keep this.") == 1 and text.count("## My notes") == 1
    check(text, "Options other than the defaults: none")


PUSH = """
import sys
from structlora_trl import StructLoRACallback
from tests.support.jobs import sft
trainer = sft(sys.argv[1], [StructLoRACallback(gate_init=0.8)], hub_model_id="me/adapter", hub_token="hf_x", push_to_hub=True)
trainer.train()
trainer.push_to_hub()
"""


def test_card_on_the_hub(tmp_path):
    with Hub() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", PUSH, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, env=environment
        )
    assert done.returncode == 0, done.stderr[-4000:]
    check(hub.files["README.md"].decode())
    assert "adapter_model.safetensors" in hub.files
