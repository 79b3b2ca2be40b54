"""Write the tables of options.md from the options' own help (`python docs/options.py`)."""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "options.md"
BEGIN, END = "<!-- options, by options.py -->", "<!-- end of options -->"
# The first option of each group.
GROUPS = {"gates": "Gates", "coordinator": "Coordinator", "adapter_name": "Which adapter"}


def page() -> str:
    """The whole page: its text, and between the two marks a table for each group of options."""
    sys.path.insert(0, str(ROOT))
    from structlora_trl import StructLoRAConfig

    lines: list[str] = []
    for option in fields(StructLoRAConfig):
        if option.name in GROUPS:
            lines += [
                f"\n### {GROUPS[option.name]}\n",
                "| option | default | what it does |",
                "|---|---|---|",
            ]
        help = re.sub(r"'[\w%]+'", r"`\g<0>`", option.metadata["help"])  # values, as code
        lines.append(f"| `{option.name}` | `{option.default!r}` | {help} |")
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: options")
