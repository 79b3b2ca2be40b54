"""Write the README's sections on front doors, each from its folder's own README.md (`python docs/front_doors.py`)."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOORS = ("axolotl", "llamafactory", "ms_swift")
BEGIN, END = "<!-- front doors, by docs/front_doors.py -->", "<!-- end of front doors -->"


def page() -> str:
    """The whole README."""
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    sections = [(ROOT / "integrations" / door / "README.md").read_text(encoding="utf-8").strip() for door in DOORS]
    return (
        f"{before}{BEGIN}\n\n" + "\n\n".join(f"#{section}" for section in sections) + f"\n\n{END}{rest.split(END)[1]}"
    )


if __name__ == "__main__":
    README.write_text(page(), encoding="utf-8")
    print(f"{README}: front doors")
