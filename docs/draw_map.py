"""Draw map.svg, the picture of how-it-works.md: latent factors, gates, depth graph, effective factors, and the way back."""

from __future__ import annotations

from pathlib import Path

PICTURE = Path(__file__).parent / "map.svg"
WIDTH, HEIGHT = 960, 405
DEPTHS, RANK = 5, 6
INK, FAINT, FORWARD, BACK, NODE = "#24292f", "#8c959f", "#0969da", "#bc4c00", "#ddf4ff"
TOP, BOTTOM = 100, 290  # of the four panels
CENTRES = {"latent": 115, "gates": 360, "graph": 600, "effective": 845}
SEMANTIC = ((0, 2), (1, 4))  # edges of the sketch that are not between neighbours
GATES = (
    "951862",
    "916742",
    "832951",
    "724918",
    "613829",
)  # tenths: how open each direction is, a row per depth


def picture() -> str:
    """The whole drawing, SVG."""
    heads = "".join(
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{colour}"/></marker>'
        for name, colour in (("forward", FORWARD), ("back", BACK))
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" fill="{INK}">',
        "<title>StructLoRA's map from latent to effective factors, and the way back</title>",
        f"<defs>{heads}</defs>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="white"/>',
        *_factors("latent", "latent A, B", "the optimizer steps these"),
        *_gates(),
        *_graph(),
        *_factors("effective", "effective A′, B′", "the model computes with these"),
        *_arrows(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _factors(panel: str, title: str, role: str) -> list[str]:
    """A kind's factors, one card per depth: A is wide (r x k), B is tall (d x r)."""
    centre = CENTRES[panel]
    parts = _heading(centre, title, role)
    for depth in reversed(range(DEPTHS)):
        x, y = centre - 80 + 12 * depth, BOTTOM - 118 - 14 * depth
        parts += [
            f'<rect x="{x}" y="{y}" width="112" height="112" rx="5" fill="white" stroke="{FAINT}"/>',
            f'<rect x="{x + 10}" y="{y + 12}" width="22" height="88" fill="{NODE}" stroke="{INK}"/>',
            f'<rect x="{x + 42}" y="{y + 45}" width="60" height="22" fill="{NODE}" stroke="{INK}"/>',
        ]
    mark = "′" if panel == "effective" else ""
    return [
        *parts,
        _text(centre - 59, BOTTOM - 57, f"B{mark}", 13),
        _text(centre - 8, BOTTOM - 57, f"A{mark}", 13),
    ]


def _gates() -> list[str]:
    centre = CENTRES["gates"]
    parts = _heading(centre, "gates", "B·diag(m) / m₀")
    for depth, row in enumerate(GATES):
        parts += [
            f'<circle cx="{centre - 65 + 26 * direction}" cy="{TOP + 22 + 36 * depth}" r="10" stroke="{INK}" '
            f'fill="{FORWARD}" fill-opacity="{int(tenths) / 10}"/>'
            for direction, tenths in enumerate(row)
        ]
    return parts


def _graph() -> list[str]:
    """Neighbours in depth joined by solid lines, semantic edges by dashed arcs."""
    centre = CENTRES["graph"]
    heights = [TOP + 22 + 36 * depth for depth in range(DEPTHS)]
    parts = _heading(centre, "depth graph", "h + σ(Â h Θ)")
    parts.append(f'<path d="M{centre},{heights[0]} V{heights[-1]}" stroke="{INK}" stroke-width="2"/>')
    for one, other in SEMANTIC:
        bend = centre + 30 * (other - one)
        parts.append(
            f'<path d="M{centre},{heights[one]} Q{bend},{(heights[one] + heights[other]) / 2} {centre},{heights[other]}" '
            f'fill="none" stroke="{FORWARD}" stroke-width="2" stroke-dasharray="5 4"/>'
        )
    for depth, y in enumerate(heights):
        parts.append(f'<circle cx="{centre}" cy="{y}" r="12" fill="{NODE}" stroke="{INK}"/>')
        parts.append(_text(centre, y + 4, str(depth), 11))
    return parts


def _arrows() -> list[str]:
    middle, under = (TOP + BOTTOM) / 2, BOTTOM + 45
    stops = ((205, 270), (455, 555), (665, 740))
    parts = [_path(f"M{start},{middle} H{end}", "forward") for start, end in stops]
    first, last = CENTRES["latent"], CENTRES["effective"]
    parts.append(_path(f"M{last},{BOTTOM + 8} V{under} H{first} V{BOTTOM + 8}", "back"))
    for panel, what in (("gates", "φ"), ("graph", "Θ")):
        parts.append(_path(f"M{CENTRES[panel]},{under} V{BOTTOM + 8}", "back"))
        parts.append(_text(CENTRES[panel] + 14, under - 14, what, 14, BACK))
    return [
        *parts,
        _text(
            WIDTH / 2,
            under + 25,
            "gradient of A′, B′ → one vector-Jacobian product → gradients of A, B, φ and Θ",
            14,
            BACK,
        ),
        _text(WIDTH / 2, under + 50, "computed around the optimizer step, never inside the model", 13, FAINT),
        _text(WIDTH / 2, 30, "one kind of module, all depths at once (five drawn)", 13, FAINT),
    ]


def _heading(x: float, title: str, role: str) -> list[str]:
    return [_text(x, TOP - 38, title, 16, weight="bold"), _text(x, TOP - 18, role, 12)]


def _text(x: float, y: float, words: str, size: int, colour: str = INK, weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{colour}" text-anchor="middle">{words}</text>'


def _path(line: str, way: str) -> str:
    colour = FORWARD if way == "forward" else BACK
    return f'<path d="{line}" fill="none" stroke="{colour}" stroke-width="2" marker-end="url(#{way})"/>'


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
