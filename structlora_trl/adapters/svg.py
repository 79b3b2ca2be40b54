"""Inline SVG for the report page: heat maps and line charts, on the standard library alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

VIRIDIS = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
RED_BLUE = ("#2166ac", "#67a9cf", "#d1e5f0", "#f7f7f7", "#fddbc7", "#ef8a62", "#b2182b")
_SHADES = 64  # cells of one shade are one path, so that large maps stay small
_MAP, _CELL = (230, 320), (4, 20)  # pixels: most of a map's width and height; least and most of a cell's
_LABEL, _LINE = 26, 12  # pixels: room for a row's label, height of a line of text
_CHART, _MARGIN = (250, 180), (54, 12, 12, 30)  # pixels; left, right, top, bottom


class Scale(NamedTuple):
    """Values and their colours."""

    low: float
    high: float
    colours: tuple[str, ...] = VIRIDIS

    def shade(self, value: float) -> int:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(min(max(share, 0.0), 1.0) * (_SHADES - 1))

    def colour(self, shade: int) -> str:
        place = shade / (_SHADES - 1) * (len(self.colours) - 1)
        index = min(int(place), len(self.colours) - 2)
        ends = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in self.colours[index : index + 2]]
        mixed = (a + (b - a) * (place - index) for a, b in zip(*ends, strict=True))
        return "#" + "".join(f"{round(part):02x}" for part in mixed)


class Line(NamedTuple):
    """A curve of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str


def heat_map(rows: Sequence[Sequence[float]], scale: Scale, labels: Sequence[str], across: str) -> str:
    """A matrix as coloured cells.

    Args:
        rows (`Sequence[Sequence[float]]`): (L, n).
        scale (`Scale`): its colours.
        labels (`Sequence[str]`): L, of the rows.
        across (`str`): what the columns are.
    """
    width, height = (
        min(max(room / count, _CELL[0]), _CELL[1]) for room, count in zip(_MAP, (len(rows[0]), len(rows)), strict=True)
    )
    cells: dict[int, list[str]] = defaultdict(list)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            cells[scale.shade(value)].append(
                f"M{_LABEL + j * width:.4g} {i * height:.4g}h{width:.4g}v{height:.4g}h-{width:.4g}z"
            )
    paths = [f'<path fill="{scale.colour(shade)}" d="{"".join(parts)}"/>' for shade, parts in sorted(cells.items())]
    every = math.ceil(_LINE / height)
    texts = [
        f'<text x="{_LABEL - 4}" y="{(i + 0.5) * height + 4:.4g}" text-anchor="end">{escape(label)}</text>'
        for i, label in enumerate(labels)
        if i % every == 0
    ]
    right, bottom = _LABEL + width * len(rows[0]), height * len(rows)
    texts.append(
        f'<text x="{(_LABEL + right) / 2:.4g}" y="{bottom + 14:.4g}" text-anchor="middle">{escape(across)}</text>'
    )
    return _svg(max(right, 120), bottom + 18, [*paths, *texts])


def legend(scale: Scale, marks: dict[str, float]) -> str:
    """The colours of a scale with its ends, and some values marked."""
    width, left = 260, 40
    step = width / _SHADES
    steps = [
        f'<path fill="{scale.colour(i)}" d="M{left + step * i:.4g} 2h{step + 0.5:.4g}v12h-{step + 0.5:.4g}z"/>'
        for i in range(_SHADES)
    ]
    texts = [
        f'<text x="{left - 4}" y="12" text-anchor="end">{_figure(scale.low)}</text>',
        f'<text x="{left + width + 4}" y="12">{_figure(scale.high)}</text>',
    ]
    for name, value in marks.items():
        if scale.low <= value <= scale.high and scale.high > scale.low:
            x = left + width * (value - scale.low) / (scale.high - scale.low)
            texts.append(
                f'<path class="mark" d="M{x:.4g} 0v16"/><text x="{x:.4g}" y="28" text-anchor="middle">{escape(name)}</text>'
            )
    return _svg(width + 2 * left + 10, 32, [*steps, *texts])


def chart(
    lines: Sequence[Line], across: str, logarithmic: bool = False, span: tuple[float, float] | None = None
) -> str:
    """Curves over a common axis.

    Args:
        lines (`Sequence[Line]`): points that are not finite, or not positive where the axis is logarithmic, are left out.
        across (`str`): what x is; whole numbers.
        logarithmic (`bool`, *optional*, defaults to False): whether the axis of y is.
        span (`tuple[float, float]`, *optional*): least and largest y; those of the lines where omitted.
    """
    points = [
        [
            (x, math.log10(y) if logarithmic else y)
            for x, y in zip(line.x, line.y, strict=True)
            if _is_drawn(y, logarithmic)
        ]
        for line in lines
    ]
    drawn = [point for part in points for point in part]
    if not drawn:
        return _svg(_CHART[0], _LINE * 2, ['<text x="4" y="14">nothing to draw</text>'])
    left, right = _range([x for x, _ in drawn])
    low, high = _range([y for _, y in drawn] if span is None else [math.log10(y) if logarithmic else y for y in span])
    x0, x1, y0, y1 = _MARGIN[0], _CHART[0] - _MARGIN[1], _CHART[1] - _MARGIN[3], _MARGIN[2]

    def place(x: float, y: float) -> str:
        return f"{x0 + (x - left) / (right - left) * (x1 - x0):.5g} {y0 + (y - low) / (high - low) * (y1 - y0):.5g}"

    parts = []
    for share in (0.0, 0.5, 1.0):
        y = low + share * (high - low)
        at = y0 + share * (y1 - y0)
        parts.append(f'<path class="grid" d="M{x0} {at:.4g}H{x1}"/>')
        label = _figure(10**y if logarithmic else y)
        parts.append(f'<text x="{x0 - 4}" y="{at + 4:.4g}" text-anchor="end">{label}</text>')
    for x in sorted({math.ceil(left), round((left + right) / 2), math.floor(right)}):
        at = place(x, low).split()[0]
        parts.append(f'<text x="{at}" y="{y0 + 13}" text-anchor="middle">{x}</text>')
    for line, part in zip(lines, points, strict=True):
        title = f"<title>{escape(line.name)}</title>"
        if len(part) == 1:
            x, y = place(*part[0]).split()
            parts.append(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{line.colour}">{title}</circle>')
        elif part:
            path = "M" + "L".join(place(*point) for point in part)
            parts.append(f'<path class="line" stroke="{line.colour}" d="{path}">{title}</path>')
    parts.append(f'<text x="{(x0 + x1) / 2}" y="{_CHART[1] - 3}" text-anchor="middle">{escape(across)}</text>')
    return _svg(*_CHART, parts)


def _is_drawn(y: float, logarithmic: bool) -> bool:
    return math.isfinite(y) and (y > 0 or not logarithmic)


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _figure(value: float) -> str:
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e5 else f"{value:.3g}"


def _svg(width: float, height: float, parts: list[str]) -> str:
    size = f'viewBox="0 0 {width:.5g} {height:.5g}" width="{width:.5g}" height="{height:.5g}"'
    return f'<svg {size} role="img">{"".join(parts)}</svg>'
