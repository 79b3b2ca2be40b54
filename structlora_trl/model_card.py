"""The model card that PEFT, TRL and Trainer write: a tag and a section that say how the adapter was trained and how to load it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from huggingface_hub import ModelCard
from peft import PeftModel

from .config import StructLoRAConfig

TAG = "structlora"
HEADING = "## StructLoRA"
CARD_NAME = "README.md"


def section(config: StructLoRAConfig) -> str:
    """The section of a model card, Markdown."""
    given = {f.name: getattr(config, f.name) for f in fields(StructLoRAConfig)}
    changed = [f"`{name}={given[name]!r}`" for name in given if given[name] != getattr(StructLoRAConfig(), name)]
    return f"""{HEADING}

This adapter was trained with [StructLoRA](https://arxiv.org/abs/2603.14228): LoRA whose rank-one directions pass an
information-bottleneck gate during training (filter `{config.filter}`), with updates coordinated across depth (coordinator
`{config.coordinator}`). Options other than the defaults: {", ".join(changed) or "none"}.

To load it, nothing but PEFT (or vLLM, SGLang, llama.cpp) is needed: the file is a plain LoRA adapter.
"""


def describe(path: Path, text: str) -> None:
    """Add the tag and the section to a card; a section that is there already is replaced.

    Args:
        path (`Path`): the card, a `README.md`.
        text (`str`): what `section` returned.
    """
    card = ModelCard.load(path)
    card.data["tags"] = sorted({*(card.data.get("tags") or []), TAG})
    _put_section(card, text)
    card.save(path)


def undescribe(path: Path) -> None:
    """Take the tag and the section off a card that an earlier run left, if there is one; all other text is kept.

    Args:
        path (`Path`): the card, a `README.md`.
    """
    if not path.is_file() or HEADING not in path.read_text(encoding="utf-8"):
        return
    card = ModelCard.load(path)
    card.data["tags"] = [tag for tag in card.data.get("tags") or [] if tag != TAG] or None
    _put_section(card, "")
    card.save(path)


def _put_section(card: ModelCard, text: str) -> None:
    before, _, rest = card.text.partition(HEADING)
    _, _, after = rest.partition("\n## ")
    card.text = "\n\n".join(part for part in (before.rstrip(), text.rstrip(), after and f"## {after}") if part) + "\n"


class DescribedCard:
    """Replaces `PeftModel.create_or_update_model_card` on one model, and can be copied and pickled with it.

    Args:
        model (`PeftModel`): the model whose `save_pretrained` writes the card.
        text (`str`): the section.
    """

    def __init__(self, model: PeftModel, text: str):
        self.model, self.text = model, text

    def __call__(self, output_dir: str) -> None:
        type(self.model).create_or_update_model_card(self.model, output_dir)
        describe(Path(output_dir) / CARD_NAME, self.text)


def describe_adapter(model: PeftModel, config: StructLoRAConfig) -> None:
    """From now on the cards that `model.save_pretrained` writes have tag and section."""
    model.create_or_update_model_card = DescribedCard(model, section(config))


def describe_trainer(trainer, config: StructLoRAConfig) -> None:
    """From now on the cards that `trainer.create_model_card` writes, on `push_to_hub` too, have tag and section."""
    create = type(trainer).create_model_card

    def create_model_card(*args, **kwargs):
        create(trainer, *args, **kwargs)
        path = Path(trainer.args.output_dir) / CARD_NAME
        if trainer.is_world_process_zero() and path.is_file():
            describe(path, section(config))

    trainer.create_model_card = create_model_card
