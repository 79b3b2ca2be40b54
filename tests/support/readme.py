"""The README's examples, as their readers paste them."""

from __future__ import annotations

from tests.support.launching import ROOT


def readme_block(section: str, language: str = "yaml") -> str:
    """The first block of code in a section of the README.

    Args:
        section (`str`): its heading, whatever its level.
        language (`str`, *optional*, defaults to "yaml"): of the block.

    Raises:
        AssertionError: no such section, or no such block in it.
    """
    lines = iter((ROOT / "README.md").read_text(encoding="utf-8").splitlines())
    assert any(line.startswith("#") and line.lstrip("#").strip() == section for line in lines), f"no section {section}"
    inside = []
    for line in lines:
        if line.startswith("## "):
            break
        inside.append(line)
    assert f"```{language}" in inside, f"no block of {language} in the section {section}"
    start = inside.index(f"```{language}") + 1
    return "\n".join(inside[start : inside.index("```", start)]) + "\n"
