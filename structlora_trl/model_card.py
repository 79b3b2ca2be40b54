"""Model cards of PEFT, TRL and Trainer: a tag, and a section on how an adapter was trained and loads."""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path

from huggingface_hub import ModelCard
from peft import PeftModel, PeftType
from torch import nn

from .config import StructLoRAConfig

TAG = "structlora"
HEADING = "## StructLoRA"
CARD_NAME = "README.md"
# From the heading to the last paragraph that `section` writes; people may have written more below.
_LAST = "To load it, nothing but"
_SECTION = re.compile(rf"^{HEADING}[ \t\r]*$.*?(^{_LAST}[^\n]*$|(?=^#{{1,6}} )|\Z)", re.MULTILINE | re.DOTALL)
# PEFT's type -> what people call it, and what loads it.
_ADAPTERS = {"LORA": ("LoRA", "PEFT (or vLLM, SGLang, llama.cpp)"), "VERA": ("VeRA", "PEFT")}


def section(config: StructLoRAConfig, peft_type: str) -> str:
    """The section of a model card on an adapter of type "LORA" or "VERA", Markdown."""
    adapter, loader = _ADAPTERS[peft_type]
    changed = [f"`{name}={value!r}`" for name, value in config.changed_options().items()]
    return f"""{HEADING}

This adapter was trained with [StructLoRA](https://arxiv.org/abs/2603.14228): {adapter} whose rank-one directions pass an
information-bottleneck gate during training (filter `{config.filter}`), with updates coordinated across depth (coordinator
`{config.coordinator}`). Options other than the defaults: {", ".join(changed) or "none"}.

{_LAST} {loader} is needed: the file is a plain {adapter} adapter.
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
    """Take the tag and the section that an earlier run left off a card, if there; other text is kept.

    Args:
        path (`Path`): the card, a `README.md`.
    """
    if not path.is_file() or not _SECTION.search(path.read_text(encoding="utf-8")):
        return
    card = ModelCard.load(path)
    card.data["tags"] = [tag for tag in card.data.get("tags") or [] if tag != TAG] or None
    _put_section(card, "")
    card.save(path)


def _put_section(card: ModelCard, text: str) -> None:
    found = _SECTION.search(card.text)
    before, after = (card.text[: found.start()], card.text[found.end() :]) if found else (card.text, "")
    card.text = "\n\n".join(part for part in (before.rstrip(), text.strip(), after.strip()) if part) + "\n"


class Description:
    """The section on one adapter, for as long as its weights are those that StructLoRA trained.

    Args:
        text (`str`): what `section` returned.
        weights (`list[nn.Parameter]`): the adapter's.
    """

    def __init__(self, text: str, weights: list[nn.Parameter]):
        self.text, self._weights = text, weights
        self._left: list[int] | None = None  # versions of the weights when training ended

    def end(self) -> None:
        """Training is over: once anything else writes the weights, the section says nothing about them."""
        self._left = self._versions()

    @property
    def holds(self) -> bool:
        """Whether the adapter's weights are those that StructLoRA trained."""
        return self._left is None or self._left == self._versions()

    def _versions(self) -> list[int]:
        return [weight._version for weight in self._weights]

    def __deepcopy__(self, memo: dict) -> Description:
        twin = copy.copy(self)
        twin._weights = copy.deepcopy(self._weights, memo)
        twin._left = twin._versions() if self.holds else []
        return twin


class DescribedSave:
    """Replaces `save_pretrained` of one model, so that cards of a described adapter have the section.

    It can be copied with the model; in a pickle there is the method that it replaced. PEFT has no public way
    to add to a card (0.21; `upstream/peft-save-hook.md`).

    Args:
        model (`PeftModel`): whose `save_pretrained` writes the card.
    """

    def __init__(self, model: PeftModel):
        self.model, self._save = model, model.save_pretrained
        self._covered = vars(model).get("save_pretrained")  # set on the instance by someone before us
        self.descriptions: dict[str, Description] = {}

    def __call__(self, save_directory: str, *args, **kwargs) -> None:
        self._save(save_directory, *args, **kwargs)
        given = inspect.signature(type(self.model).save_pretrained).bind(
            self.model, save_directory, *args, **kwargs
        )
        path = Path(save_directory) / CARD_NAME
        if not given.arguments.get("is_main_process", True) or not path.is_file():
            return
        text = self.text(given.arguments.get("selected_adapters"))
        if text is None:
            undescribe(path)
        else:
            describe(path, text)

    def text(self, adapters: list[str] | None = None) -> str | None:
        """The section that holds for some adapters, all of the model's by default; None where there is none."""
        names = self.model.peft_config if adapters is None else adapters
        return next((d.text for name, d in self.descriptions.items() if name in names and d.holds), None)

    def __deepcopy__(self, memo: dict) -> DescribedSave:
        twin = object.__new__(DescribedSave)  # not `copy.copy`, which goes by `__reduce__`
        memo[id(self)] = twin
        twin.model, twin._save, twin._covered, twin.descriptions = (
            copy.deepcopy(part, memo) for part in (self.model, self._save, self._covered, self.descriptions)
        )
        return twin

    def __reduce__(self):
        if self._covered is None:
            return getattr, (self.model, "save_pretrained")
        return copy.copy, (self._covered,)


def describe_adapter(
    model: PeftModel, adapter_name: str, config: StructLoRAConfig, weights: list[nn.Parameter]
) -> Description:
    """From now on the cards that `model.save_pretrained` writes with this adapter have tag and section."""
    save = vars(model).get("save_pretrained")
    if not isinstance(save, DescribedSave):
        save = model.save_pretrained = DescribedSave(model)
    text = section(config, PeftType(model.peft_config[adapter_name].peft_type).value)
    save.descriptions[adapter_name] = Description(text, weights)
    return save.descriptions[adapter_name]


def describe_trainer(trainer, save: DescribedSave) -> None:
    """Cards by `trainer.create_model_card`, on `push_to_hub` too, have tag and section from now on."""
    create = type(trainer).create_model_card

    def create_model_card(*args, **kwargs):
        create(trainer, *args, **kwargs)
        path, text = Path(trainer.args.output_dir) / CARD_NAME, save.text()
        if trainer.is_world_process_zero() and path.is_file() and text is not None:
            describe(path, text)

    trainer.create_model_card = create_model_card
