"""Write the lists of what-runs.md, from the rows of tests/support/setups.py (`python docs/what_runs.py`)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "what-runs.md"
BEGIN, END = "<!-- set-ups, by what_runs.py -->", "<!-- end of set-ups -->"


def page() -> str:
    """The whole page: its text, and between the two marks a section for each group of rows."""
    sys.path.insert(0, str(ROOT))
    from tests.support.setups import SETUPS

    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    sections = (
        f"## {group}\n\n" + "\n".join(f"* {_marked(row.name)}" for row in rows)
        for group, rows in SETUPS.items()
    )
    return f"{before}{BEGIN}\n\n" + "\n\n".join(sections) + f"\n\n{END}{rest.split(END)[1]}"


def _marked(name: str) -> str:
    """A name with what is code in it marked as code: words with an underscore, a dot, an equals sign or brackets."""
    return re.sub(r"\w+[_.=(][^ ]*", r"`\g<0>`", name)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: set-ups")
