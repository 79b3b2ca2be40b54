"""The examples of the pages for users, as their readers paste them."""

from __future__ import annotations

import re

from tests.support.launching import ROOT

INTEGRATIONS = {"Axolotl": "axolotl", "LLaMA-Factory": "llamafactory", "ms-swift": "ms_swift"}


def readme_block(name: str, language: str = "yaml") -> str:
    """The first block of code on an integration's page.

    Args:
        name (`str`): what the page calls the trainer.
        language (`str`, *optional*, defaults to "yaml"): of the block.
    """
    return code_blocks(f"integrations/{INTEGRATIONS[name]}/README.md", language)[0]


def code_blocks(page: str, language: str) -> list[str]:
    """The blocks of code in a language, of a page by its path."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
