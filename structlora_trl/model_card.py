"""Model cards of PEFT, TRL and Trainer: a tag, and a section on how an adapter was trained and loads.

The section is written into cards that lie in the output folder when training ends, and in its checkpoints.
What saves into that folder afterwards keeps the text of a card (PEFT's `save_pretrained`), or writes its own
(TRL's `create_model_card`).
"""

from __future__ import annotations

import logging
import re
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
_SERVERS = (
    " With vLLM: `vllm serve BASE --enable-lora --lora-modules NAME=FOLDER`; `structlora inspect` says what SGLang, LoRAX "
    "and llama.cpp need."
)
# From the heading to the last paragraph that `section` writes; people may have written more below.
_LAST = "To load it, nothing but"
_SECTION = re.compile(rf"^{HEADING}[ \t\r]*$.*?(^{_LAST}[^\n]*$|(?=^#{{1,6}} )|\Z)", re.MULTILINE | re.DOTALL)


def describe_run(path: Path, runtime: Runtime, model: PeftModel) -> None:
    """Add tag and section on a run to the card of its adapter; where there is none yet, PEFT makes one. A card that
    cannot be read or written is left as it is, with a warning.

    Args:
        path (`Path`): the card, a `README.md`. One without metadata is no model's card, and is left alone.
        runtime (`Runtime`): of the run.
        model (`PeftModel`): that was trained.
    """
    base = model.get_base_model()
    if isinstance(base, PreTrainedModel):
        base.add_model_tags([TAG])  # PEFT writes the tags of a card anew, from these
    _put(path, section(runtime), model if isinstance(model, PeftModel) else None)


def undescribe(path: Path) -> None:
    """Take the tag and the section that an earlier run left off a card, if there; other text is kept. A card that
    cannot be read or written is left as it is, with a warning.

    Args:
        path (`Path`): the card, a `README.md`.
    """
    _put(path, "")


def section(runtime: Runtime) -> str:
    """The section of a model card on what acted in a run, Markdown."""
    config, adapter = runtime.config, "VeRA" if runtime.kinds[0].is_vera else "LoRA"
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
    servers = _SERVERS if adapter == "LoRA" else ""
    return f"""{HEADING}

This {adapter} adapter was trained with [StructLoRA](https://arxiv.org/abs/2603.14228): {"; ".join(acted) or "nothing acted"}.
Options other than the defaults: {", ".join(changed) or "none"}.

{_LAST} PEFT is needed: the file is a plain {adapter} adapter, for `PeftModel.from_pretrained(base, FOLDER)`.{servers}
"""


def _put(path: Path, text: str, model: PeftModel | None = None) -> None:
    """Replace the section of a card and set the tag; without text, remove both. A run does not end for a card."""
    try:
        if model is not None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            model.create_or_update_model_card(str(path.parent))
        if not path.is_file() or not path.read_text(encoding="utf-8").startswith("---"):
            return
        card = ModelCard.load(path)
        found = _SECTION.search(card.text)
        if not text and not found:
            return
        tags = {*(card.data.get("tags") or []), TAG} - ({TAG} if not text else set())
        card.data["tags"] = sorted(tags) or None
        before, after = (card.text[: found.start()], card.text[found.end() :]) if found else (card.text, "")
        card.text = (
            "\n\n".join(part for part in (before.rstrip(), text.strip(), after.strip()) if part) + "\n"
        )
        card.save(path)
    except (OSError, ValueError, YAMLError) as error:
        logger.warning("The model card %s was left as it is (%s).", path, " ".join(str(error).split()))
