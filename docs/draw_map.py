"""Draw map.svg, the picture of the method: gates in the forward, the coordinator after the backward.

Narrow and tall, so that its words can be read on a telephone: at 390 pixels they have 11 and more.
"""

from __future__ import annotations

from pathlib import Path

PICTURE = Path(__file__).parent / "map.svg"
WIDTH, HEIGHT = 480, 732
INK, FAINT, FORWARD, BACK, FACTOR = "#24292f", "#57606a", "#0969da", "#bc4c00", "#ddf4ff"
LARGE, SMALL = 18, 15  # of the words, in units of which the picture is 480 wide
RANK, REACH = 5, 11  # of the sketch: its gates, and how far they reach
DEPTHS, SEMANTIC = 4, ((0, 2), (1, 3))  # edges of the sketch that are not between neighbours
SPLIT = 352  # where the second half begins


def picture() -> str:
    """The whole drawing, SVG."""
    heads = "".join(
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{colour}"/></marker>'
        for name, colour in (("forward", FORWARD), ("back", BACK))
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" font-family="sans-serif" '
        f'fill="{INK}">',
        "<title>StructLoRA: gates in the forward, a coordinator over depth after the backward</title>",
        f"<defs>{heads}</defs>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="white"/>',
        *_forward(),
        f'<path d="M20,{SPLIT - 12} H{WIDTH - 20}" stroke="#d0d7de"/>',
        *_after_backward(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _forward() -> list[str]:
    """One module: the base weight above, its adapter below, a gate on each of the r activations between A and B."""
    low, high = 205, 110  # heights of the adapter's and of the base weight's way
    start, end = 45, 435
    gates = [
        part
        for place in range(RANK)
        for part in (
            _circle(230, low - 56 + 28 * place, REACH, FORWARD, 0.25),
            _circle(230, low - 56 + 28 * place, 4, FORWARD),
        )
    ]
    return [
        _words(20, 34, "1. In the forward: gates", LARGE, weight="bold"),
        _words(20, 58, "y = W x + s·B (m ⊙ A x)", SMALL, FAINT),
        _arrow(f"M{start + 14},{high} H204", "forward"),
        f'<rect x="208" y="{high - 27}" width="44" height="44" fill="#f6f8fa" stroke="{FAINT}"/>',
        _words(230, high, "W", SMALL, anchor="middle"),
        _arrow(f"M254,{high} H{end - 2} V{low - 18}", "forward"),
        _words(start, (high + low) / 2 + 5, "x", LARGE, anchor="middle"),
        f'<path d="M{start + 14},{high} H{start} V{(high + low) / 2 - 14} M{start},{(high + low) / 2 + 14} V{low}" '
        f'fill="none" stroke="{FORWARD}" stroke-width="2"/>',
        _arrow(f"M{start},{low} H84", "forward"),
        f'<rect x="88" y="{low - 14}" width="92" height="28" fill="{FACTOR}" stroke="{INK}"/>',
        _words(134, low + 6, "A", SMALL, anchor="middle"),
        _arrow(f"M182,{low} H208", "forward"),
        *gates,
        _words(206, low + 64, "m", SMALL, FAINT),
        _arrow(f"M252,{low} H296", "forward"),
        f'<rect x="300" y="{low - 50}" width="28" height="100" fill="{FACTOR}" stroke="{INK}"/>',
        _words(314, low + 6, "B", SMALL, anchor="middle"),
        _arrow(f"M330,{low} H{end - 18}", "forward"),
        f'<circle cx="{end - 2}" cy="{low}" r="14" fill="white" stroke="{INK}"/>',
        _words(end - 2, low + 6, "+", LARGE, anchor="middle"),
        _words(end - 2, low + 42, "y", LARGE, anchor="middle"),
        _words(20, 296, "m: a gate on each direction, noise of mean one whose", SMALL),
        _words(20, 317, "size is learned. In eval() m is 1: plain LoRA.", SMALL),
    ]


def _after_backward() -> list[str]:
    """The layers of one kind as a graph over depth, and beside it what happens around the optimizer's step."""
    top, gap, x = SPLIT + 92, 62, 72
    heights = [top + gap * depth for depth in range(DEPTHS)]
    graph = [f'<path d="M{x},{heights[0]} V{heights[-1]}" stroke="{INK}" stroke-width="2"/>']
    for place, (one, other) in enumerate(SEMANTIC):
        bend = x + (62 if place else -62)
        graph.append(
            f'<path d="M{x},{heights[one]} Q{bend},{(heights[one] + heights[other]) / 2} {x},{heights[other]}" fill="none" '
            f'stroke="{FORWARD}" stroke-width="2" stroke-dasharray="5 4"/>'
        )
    for depth, y in enumerate(heights):
        graph.append(f'<circle cx="{x}" cy="{y}" r="17" fill="{FACTOR}" stroke="{INK}"/>')
        graph.append(_words(x, y + 6, str(depth), SMALL, anchor="middle"))
    steps = (
        ("gradients of A′, B′", "plain backward, any engine"),
        ("gradients of A, B, Θ", "one vector-Jacobian product"),
        ("the optimizer's step", "on A, B and Θ"),
        ("A′ = A + tanh(Θᵀ Â (A − A₀))", "written into the model"),
    )
    flow = []
    for place, (what, how) in enumerate(steps):
        y = heights[place]
        flow += [
            f'<rect x="176" y="{y - 25}" width="284" height="46" rx="6" fill="white" stroke="{BACK}"/>',
            _words(188, y - 6, what, SMALL),
            _words(188, y + 13, how, SMALL, FAINT),
        ]
        if place:
            flow.append(_arrow(f"M318,{y - gap + 22} V{y - 27}", "back"))
    return [
        _words(20, SPLIT + 20, "2. After the backward: a coordinator over depth", LARGE, weight="bold"),
        _words(20, SPLIT + 44, "The same module at all depths (four drawn)", SMALL, FAINT),
        *graph,
        *flow,
        _words(20, HEIGHT - 42, "Between steps the parameters are A′, B′: the plain LoRA", SMALL),
        _words(20, HEIGHT - 20, "adapter that is evaluated and saved.", SMALL),
    ]


def _words(
    x: float,
    y: float,
    words: str,
    size: int,
    colour: str = INK,
    weight: str = "normal",
    anchor: str = "start",
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{colour}" '
        f'text-anchor="{anchor}">{words}</text>'
    )


def _circle(x: float, y: float, radius: float, colour: str, opacity: float = 1) -> str:
    return f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{colour}" fill-opacity="{opacity:g}"/>'


def _arrow(line: str, way: str) -> str:
    colour = FORWARD if way == "forward" else BACK
    return f'<path d="{line}" fill="none" stroke="{colour}" stroke-width="2" marker-end="url(#{way})"/>'


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
