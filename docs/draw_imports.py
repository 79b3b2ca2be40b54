"""Draw imports.svg: which parts of the package import which, from the imports themselves, without arrows that others imply."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "structlora_trl"
PICTURE = Path(__file__).parent / "imports.svg"
WIDTH, ROW, BOX, HEIGHT = 960, 76, 132, 30  # of the picture, from row to row, and of a part
INK, LINE, FILL = "#24292f", "#8c959f", "#ddf4ff"


def imports() -> dict[str, set[str]]:
    """Part of the package (a folder, or a file at its root) -> the parts that it imports when it is loaded."""
    found = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        inside = path.relative_to(PACKAGE)
        if inside.name == "__init__.py" and len(inside.parts) == 1:
            continue
        part, depth = inside.parts[0].removesuffix(".py"), len(inside.parts)
        found[part] |= set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == depth:  # relative to the package's root
                names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
                found[part] |= {name for name in names if name != part and not name.startswith("__")}
    return {part: others & found.keys() for part, others in found.items()}


def levels(graph: dict[str, set[str]]) -> dict[str, int]:
    """How far above the bottom each part stands: one more than the highest that it imports."""
    level: dict[str, int] = {}
    for part in TopologicalSorter(graph).static_order():
        level[part] = max((level[other] + 1 for other in graph[part]), default=0)
    return level


def needed(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph without arrows that longer ways imply."""
    reached: dict[str, set[str]] = {}
    for part in TopologicalSorter(graph).static_order():
        reached[part] = set(graph[part]).union(*(reached[other] for other in graph[part]))
    return {
        part: {o for o in others if not any(o in reached[p] for p in others)}
        for part, others in graph.items()
    }


def picture() -> str:
    """The whole drawing, SVG."""
    graph = imports()
    level = levels(graph)
    top = max(level.values())
    place = {}
    for height in range(top + 1):
        row = sorted(part for part in graph if level[part] == height)
        for i, part in enumerate(row):
            place[part] = (WIDTH * (i + 0.5) / len(row), 30 + (top - height) * ROW)
    lines = [
        f'<line x1="{place[part][0]:.0f}" y1="{place[part][1] + HEIGHT / 2:.0f}" x2="{place[other][0]:.0f}" '
        f'y2="{place[other][1] - HEIGHT / 2 - 3:.0f}" stroke="{LINE}" marker-end="url(#head)"/>'
        for part, others in sorted(needed(graph).items())
        for other in sorted(others)
    ]
    boxes = [
        f'<rect x="{x - BOX / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{BOX}" height="{HEIGHT}" rx="6" fill="{FILL}" '
        f'stroke="{LINE}"/><text x="{x:.0f}" y="{y + 4:.0f}" text-anchor="middle" font-size="12">{part}</text>'
        for part, (x, y) in sorted(place.items())
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {60 + top * ROW}" font-family="sans-serif" '
            f'fill="{INK}">',
            "<title>Imports of structlora_trl</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker></defs>',
            f'<rect width="{WIDTH}" height="{60 + top * ROW}" rx="8" fill="white"/>',
            *lines,
            *boxes,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
