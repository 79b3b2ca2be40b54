"""Write the README's list of what runs, from the rows of tests/support/setups.py (`python docs/what_runs.py`)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- set-ups, by docs/what_runs.py -->", "<!-- end of set-ups -->"
WIDTH = 132


def section() -> str:
    """The list between the two marks, Markdown: a point for each group of rows."""
    sys.path.insert(0, str(ROOT))
    from tests.support.setups import SETUPS

    return "\n".join(_point(group, [row.name for row in rows]) for group, rows in SETUPS.items())


def page() -> str:
    """The whole README."""
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    return f"{before}{BEGIN}\n\n{section()}\n\n{END}{rest.split(END)[1]}"


def _point(group: str, names: list[str]) -> str:
    words = f"* **{group}**: {', '.join(map(_marked, names))}.".split(" ")
    lines = [words[0]]
    for word in words[1:]:
        if len(f"{lines[-1]} {word}") > WIDTH:
            lines.append(f"  {word}")
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines)


def _marked(name: str) -> str:
    """A name with what is code in it marked as code: words with an underscore, a dot, an equals sign or brackets."""
    return re.sub(r"\w+[_.=(][^ ]*", r"`\g<0>`", name)


if __name__ == "__main__":
    README.write_text(page(), encoding="utf-8")
    print(f"{README}: what runs")
