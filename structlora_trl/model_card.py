"""Model cards of PEFT, TRL and Trainer: a tag, and a section on how an adapter was trained and loads.

The section is written into cards that lie in the output folder when training ends, and in its checkpoints.
What saves into that folder afterwards keeps the text of a card (PEFT's `save_pretrained`), or writes its own
(TRL's `create_model_card`).
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import PreTrainedModel
from yaml import YAMLError

from .runtime import Runtime

logger = logging.getLogger(__name__)

TAG = "structlora"
HEADING = "## StructLoRA"
CARD_NAME = "README.md"
# From the heading to the last paragraph that `section` writes; people may have written more below.
_LAST = "To load it, nothing but"
_SECTION = re.compile(rf"^{HEADING}[ \t\r]*$.*?(^{_LAST}[^\n]*$|(?=^#{{1,6}} )|\Z)", re.MULTILINE | re.DOTALL)


def describe_run(path: Path, runtime: Runtime, model: PeftModel) -> None:
    """Add tag and section on a run to the card of its adapter; where there is none yet, PEFT makes one. Where it
    cannot be read or written, it is left as it is, with a warning.

    Args:
        path (`Path`): the card, a `README.md`. One without metadata is no model's card, and is left alone.
        runtime (`Runtime`): of the run.
        model (`PeftModel`): that was trained.
    """
    base = model.get_base_model()
    if isinstance(base, PreTrainedModel):
        base.add_model_tags([TAG])  # PEFT writes the tags of a card anew, from these
    with _leaving(path):
        if not path.exists() and isinstance(model, PeftModel):
            path.parent.mkdir(parents=True, exist_ok=True)
            model.create_or_update_model_card(str(path.parent))
        if path.is_file() and path.read_text(encoding="utf-8").startswith("---"):
            describe(path, section(runtime))


def section(runtime: Runtime) -> str:
    """The section of a model card on what acted in a run, Markdown."""
    config, is_vera = runtime.config, runtime.kinds[0].is_vera
    adapter = "VeRA" if is_vera else "LoRA"
    servers = (
        ""
        if is_vera
        else " With vLLM: `vllm serve BASE --enable-lora --lora-modules NAME=FOLDER`; `structlora inspect` says what SGLang, "
        "LoRAX and llama.cpp need."
    )
    acted = []
    if runtime.gating.gates:
        figures = runtime.gating.metrics(runtime.openness())
        acted.append(
            f"{config.gates} gates learned under the information bottleneck, which let {figures['nats']:,.0f} nats through on "
            f"{len(runtime.gating.gates)} modules (mean openness {figures['gate_openness']:.2f})"
        )
    coordinated = sum(bool(m.coordinators) for m in runtime.maps)
    if coordinated:
        acted.append(
            f"updates coordinated across depth (`{config.coordinator}`) in {coordinated} of {len(runtime.maps)} kinds of modules"
        )
    if runtime.has_selected:
        acted.append(f"directions selected while training (`keep={config.keep!r}`)")
    changed = [f"`{name}={value!r}`" for name, value in config.changed_options().items()]
    return f"""{HEADING}

This {adapter} adapter was trained with [StructLoRA](https://arxiv.org/abs/2603.14228): {"; ".join(acted) or "nothing acted"}.
Options other than the defaults: {", ".join(changed) or "none"}.

{_LAST} PEFT is needed: the file is a plain {adapter} adapter, for `PeftModel.from_pretrained(base, FOLDER)`.{servers}
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
    """Take the tag and the section that an earlier run left off a card, if there; other text is kept. A card that
    cannot be read or written is left as it is, with a warning.

    Args:
        path (`Path`): the card, a `README.md`.
    """
    with _leaving(path):
        if not path.is_file() or not _SECTION.search(path.read_text(encoding="utf-8")):
            return
        card = ModelCard.load(path)
        card.data["tags"] = [tag for tag in card.data.get("tags") or [] if tag != TAG] or None
        _put_section(card, "")
        card.save(path)


@contextlib.contextmanager
def _leaving(path: Path) -> Iterator[None]:
    """Leave alone a card that cannot be read or written: a run does not end for it."""
    try:
        yield
    except (OSError, ValueError, YAMLError) as error:
        logger.warning("The model card %s was left as it is (%s).", path, " ".join(str(error).split()))


def _put_section(card: ModelCard, text: str) -> None:
    found = _SECTION.search(card.text)
    before, after = (card.text[: found.start()], card.text[found.end() :]) if found else (card.text, "")
    card.text = "\n\n".join(part for part in (before.rstrip(), text.strip(), after.strip()) if part) + "\n"
