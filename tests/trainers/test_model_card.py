"""The tag and the section in every model card: on save, in checkpoints, and in what `push_to_hub` uploads."""

from __future__ import annotations

import copy

import pytest
from huggingface_hub import ModelCard

from structlora_trl import StructLoRACallback, attach
from structlora_trl.model_card import HEADING, TAG, undescribe
from tests.support.jobs import plain, sft
from tests.support.tiny import adamw, attached, logits_of, peft_model, train


def check(text: str, option: str = "gate_init=0.8") -> None:
    card = ModelCard(text)
    assert TAG in card.data.tags
    assert text.count(f"\n{HEADING}\n") == 1 and option in text and "plain LoRA adapter" in text


@pytest.mark.parametrize("job", [sft, plain])
def test_cards_of_a_trainer(job, tmp_path):
    trainer = job(tmp_path, [StructLoRACallback(gate_init=0.8)], save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    trainer.create_model_card()
    trainer.create_model_card(model_name="adapter", tags=["mine"])  # as `push_to_hub` calls it
    for folder in ("checkpoint-3", "final", "."):
        check((tmp_path / folder / "README.md").read_text())


def test_card_of_a_loop_and_of_a_copy(tmp_path):
    model = peft_model()
    attach(model, adamw(model), gate_init=0.8)
    for name, holder in {"model": model, "copy": copy.deepcopy(model)}.items():
        holder.save_pretrained(tmp_path / name)
        holder.save_pretrained(tmp_path / name)
        check((tmp_path / name / "README.md").read_text())


def test_the_card_of_vera_names_what_loads_it(tmp_path):
    model = peft_model(init="vera")
    attach(model, adamw(model))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    section = text[text.index(HEADING) :]
    assert "plain VeRA adapter" in section and "LoRA adapter" not in section and "vLLM" not in section


BESIDE = ["## My notes\n\nKeep this.", "Keep this.", "# My notes\n\nKeep this.", "### My notes\n\nKeep this."]
BESIDE += ["## StructLoRA vs LoRA\n\nKeep this.", "### StructLoRA\n\nKeep this."]


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("above", [False, True])
def test_text_around_the_section_is_kept(beside, above, tmp_path):
    model = peft_model()
    runtime = attach(model, adamw(model))
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    text = card.read_text()
    place = text.index(f"\n{HEADING}\n") if above else len(text)
    card.write_text(f"{text[:place]}\n{beside}\n{text[place:]}")
    model.save_pretrained(tmp_path)
    text = card.read_text()
    assert text.count(beside) == 1 and text.count(f"\n{HEADING}\n") == 1
    check(text, "Options other than the defaults: none")
    runtime.detach()
    undescribe(card)
    assert card.read_text().count(beside) == 1 and f"\n{HEADING}\n" not in card.read_text()


def test_plain_runs_have_plain_cards(tmp_path):
    """The section holds for as long as the adapter's weights are those that StructLoRA trained."""
    model, optimizer, runtime = attached(gate_init=0.8)
    train(model, "llama", optimizer, 2)
    runtime.detach()
    logits_of(model, "llama")
    model.save_pretrained(tmp_path)
    check((tmp_path / "README.md").read_text())
    train(model, "llama", optimizer, 1)
    for holder in (model, copy.deepcopy(model)):
        holder.save_pretrained(tmp_path)
        assert TAG not in (tmp_path / "README.md").read_text().lower()


def test_each_adapter_has_a_card_of_its_own(tmp_path):
    model = peft_model()
    model.add_adapter("plain", model.peft_config["default"])
    optimizer = adamw(model)
    runtime = attach(model, optimizer, gate_init=0.8)
    train(model, "llama", optimizer, 2)
    for _ in ("attached", "detached"):
        model.save_pretrained(tmp_path / "plain", selected_adapters=["plain"])
        assert TAG not in (tmp_path / "plain" / "README.md").read_text().lower()
        model.save_pretrained(tmp_path / "ours", selected_adapters=["default"])
        check((tmp_path / "ours" / "README.md").read_text())
        runtime.detach()


def test_an_earlier_wrapper_of_save_pretrained_is_kept(tmp_path):
    model, saved = peft_model(), []
    save = model.save_pretrained
    model.save_pretrained = lambda *args, **kwargs: (saved.append(args), save(*args, **kwargs))[1]
    attach(model, adamw(model), gate_init=0.8)
    model.save_pretrained(tmp_path)
    check((tmp_path / "README.md").read_text())
    assert len(saved) == 1
