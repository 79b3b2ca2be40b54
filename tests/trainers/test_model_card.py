"""The tag and the section in model cards: in checkpoints, and where a run's adapter is saved; what acted, and nothing else."""

from __future__ import annotations

import re

import pytest
from huggingface_hub import ModelCard

from structlora_trl import StructLoRACallback
from structlora_trl.model_card import HEADING, TAG, describe_run, section, undescribe
from tests.support.jobs import JOBS, plain, sft
from tests.support.tiny import attached, peft_model, train


def check(text: str, *words: str) -> None:
    card = ModelCard(text)
    assert TAG in card.data.tags
    assert text.count(f"\n{HEADING}\n") == 1 and all(word in text for word in (*words, "plain LoRA adapter"))


@pytest.mark.parametrize("saves", ["no", "steps"])
@pytest.mark.parametrize("job, options", [(sft, {}), (plain, {"coordinator": "none"})])
def test_cards_of_a_trainer(job, options, saves, tmp_path):
    """Whoever calls `save_model` afterwards keeps the section, also where nothing was saved before."""
    trainer = job(tmp_path, [StructLoRACallback(beta=0.5, **options)], save_strategy=saves, save_steps=3)
    trainer.train()
    trainer.save_model()
    folders = [tmp_path, *tmp_path.glob("checkpoint-*")]
    assert len(folders) == 1 + (saves == "steps")
    for folder in folders:
        check((folder / "README.md").read_text(), "gaussian gates learned", "`beta=0.5`")


ACTED = {  # options -> what the section says acted
    "gates='off'": ({"gates": "off"}, ["coordinated across depth (`gcn`) in 2 of 2 kinds"]),
    "keep": (
        {"coordinator": "none", "keep": 0.25, "select_at": 10},
        ["gates learned", "directions selected while training (`keep=0.25`)"],
    ),
    "keep, not yet": ({"coordinator": "none", "keep": 0.25, "select_at": 99}, ["gates learned"]),
    "off": ({"gates": "off", "coordinator": "none"}, ["nothing acted"]),
}
WORDS = ["gates learned", "coordinated across depth", "directions selected", "nothing acted"]


@pytest.mark.parametrize("name", ACTED)
def test_the_section_says_what_acted(name):
    options, said = ACTED[name]
    model, optimizer, runtime = attached(**options)
    train(model, "llama", optimizer, 11)
    text = section(runtime)
    assert all(words in text for words in said)
    assert sum(words in text for words in WORDS) == len(said)


def test_the_card_names_what_loads_any_adapter():
    """Of LoRA with DoRA's magnitudes, say, that is PEFT alone."""
    for model, name, servers in ((peft_model(), "LoRA", True), (peft_model(init="vera"), "VeRA", False)):
        text = section(attached(model)[2])
        assert f"nothing but PEFT is needed: the file is a plain {name} adapter" in text
        assert ("vLLM" in text) == servers


BESIDE = ["## My notes\n\nKeep this.", "Keep this.", "# My notes\n\nKeep this.", "### My notes\n\nKeep this."]
BESIDE += ["## StructLoRA vs LoRA\n\nKeep this.", "### StructLoRA\n\nKeep this."]


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("above", [False, True])
def test_text_around_the_section_is_kept(beside, above, tmp_path):
    model, _, runtime = attached()
    card = tmp_path / "README.md"
    describe_run(card, runtime, model)
    text = card.read_text()
    place = text.index(f"\n{HEADING}\n") if above else len(text)
    card.write_text(f"{text[:place]}\n{beside}\n{text[place:]}")
    describe_run(card, runtime, model)
    model.save_pretrained(tmp_path)
    text = card.read_text()
    assert text.count(beside) == 1
    check(text, "Options other than the defaults: none")
    undescribe(card)
    assert card.read_text().count(beside) == 1 and not re.search(
        f"^{HEADING}$", card.read_text(), re.MULTILINE
    )


@pytest.mark.parametrize(
    "text", [b"# My project\n", b"---\nNotes\n---\n", b"---\nNotes: a: b\n---\n", b"---\n\xe9\n"]
)
def test_a_readme_that_is_no_card_is_left_alone(text, tmp_path):
    """`output_dir="."` in the folder of a project."""
    path = tmp_path / "README.md"
    path.write_bytes(text)
    model, _, runtime = attached()
    describe_run(path, runtime, model)
    undescribe(path)
    assert path.read_bytes() == text


@pytest.mark.parametrize("job, options", [("sft", {"gates": "off"}), ("dpo", {})])  # which has no gates
def test_a_run_that_is_off_says_so_and_has_a_plain_card(job, options, tmp_path, caplog):
    sft(tmp_path, [StructLoRACallback()]).train()  # whose card it takes over
    assert TAG in (tmp_path / "README.md").read_text().lower()
    trainer = JOBS[job](tmp_path, [StructLoRACallback(options, coordinator="none")])
    trainer.train()
    trainer.save_model()
    assert "trains as without StructLoRA: no gates on 9 modules (" in caplog.text
    assert TAG not in (tmp_path / "README.md").read_text().lower()
