"""The charts of one run or two, by matplotlib: panels, as SVG on the page, as PNG and PDF by `--plot`."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..core.kinds import short_names
from ..errors import StructLoRAError
from .inspecting import KindReport, final_losses, gates_in_words, log_history, report
from .load_adapter import Saved
from .pruning import size_curve
from .trial import SizeCurve

try:
    from matplotlib import colormaps, rc_context
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
except ImportError as error:
    raise StructLoRAError(
        "no matplotlib",
        "matplotlib, which `--plot` and `--html` draw with",
        'install it: `pip install "structlora-trl[plot]"`, or leave these options out',
    ) from error

RUN_COLOURS = ("#c2410c", "#1d4ed8")
_LINES = ("-", "--", ":", "-.")
_GREY = "#8b949e"  # is seen on a white page and on a dark one
# Text stays text, so that the page's own font and colour apply; nothing in the file depends on the time.
_STYLE = {
    **{"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "structlora", "axes.linewidth": 0.6},
    **{key: _GREY for key in ("axes.edgecolor", "xtick.color", "ytick.color", "grid.color")},
    **{
        "xtick.labelcolor": "black",
        "ytick.labelcolor": "black",
        "lines.linewidth": 1.4,
        "grid.linewidth": 0.5,
    },
    **{"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.4},
}
_MAP, _CHART, _WIDE = (1.5, 2.1), (2.4, 1.8), (3.4, 2.8)  # inches
_COSINES = "Reds"  # colours of cosines, from 0 to 1
_NATS = "YlGnBu"  # of nats, from 0 to the most of any module
_CELL, _LABELS, _LARGEST = (0.24, 0.26), (1.1, 0.6), (9.0, 8.0)  # inches of the map of nats
_SHARE = "share of "  # how the names of shares begin
_COLUMNS = 4  # of panels in a file
# What the Trainer logs -> the title of its chart.
_CURVES = {
    "loss": "Training loss",
    "eval_loss": "Held-out loss",
    "structlora/effective_rank": "Effective rank",
    "structlora/nats": "Nats that the gates let through",
    "structlora/gate_openness": "Mean openness of the gates",
    "structlora/stream_cosine": "Cosine of neighbours in the residual stream",
}


@dataclass
class Run:
    """What the charts show of a run.

    Args:
        name (`str`): of the run.
        saved (`Saved`): what it left.
        kinds (`dict[str, KindReport]`): by name.
        history (`list[dict]`): the Trainer's log.
        curves (`list[SizeCurve]`, *optional*): of `information_curves`, where there is data.
    """

    name: str
    saved: Saved
    kinds: dict[str, KindReport]
    history: list[dict]
    curves: list[SizeCurve] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, saved: Saved, curves: Iterable[SizeCurve] = ()) -> Run:
        """The run of an adapter that was read: its log, and the figures of each kind.

        Raises:
            StructLoRAError: the Trainer's log is damaged.
        """
        kinds = {kind.name: kind for kind in report(saved)}
        return cls(name, saved, kinds, log_history(saved.run_folder), [*curves])

    def depths(self) -> list:
        return [depth for kind in self.kinds.values() for depth in kind.depths]


class Panel(NamedTuple):
    """A drawing: what it is of, in short and in full, what draws it, its size in inches, its run."""

    title: str
    name: str
    draw: Callable[[Axes], None]
    size: tuple[float, float]
    run: str = ""

    def svg(self) -> str:
        """An `svg` element to stand in a page."""
        with rc_context(_STYLE):
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure.subplots())
            return _svg(figure)


class Scale(NamedTuple):
    """The colours of a chart's maps, from `low` to `high`."""

    colours: str
    low: float
    high: float
    label: str

    def svg(self) -> str:
        """An `svg` element with the colours and their values."""
        with rc_context(_STYLE):
            figure = Figure(figsize=(3.2, 0.6), layout="constrained")
            self.bar(figure, figure.subplots(), "horizontal")
            return _svg(figure)

    def bar(self, figure: Figure, axes: Axes, orientation: str) -> None:
        mappable = ScalarMappable(cmap=colormaps[self.colours])
        mappable.set_clim(self.low, self.high)
        into = {"cax": axes} if isinstance(axes, Axes) else {"ax": axes}
        bar = figure.colorbar(mappable, **into, orientation=orientation, label=self.label)
        ticks = np.linspace(self.low, self.high, 5)
        bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])


class Chart(NamedTuple):
    """A chart: the name of its file, its title, how to read it, what it says of each run, its panels, the
    colours of its maps.
    """

    key: str
    title: str
    text: str
    told: list[str]
    panels: list[Panel]
    scale: Scale | None = None

    def by_name(self) -> list[list[Panel]]:
        """The panels, those of one thing in both runs together."""
        return [[*panels] for _, panels in groupby(self.panels, lambda panel: panel.name)]


def charts(runs: list[Run]) -> list[Chart]:
    """Return all that can be drawn of one run, or of two side by side, what people show to others first: what the
    gates let through, the training, what a smaller adapter keeps, similarity over depth, singular values.
    """
    names = short_names([*{name: None for run in runs for name in run.kinds}])
    drawn = (
        _nats(runs, names),
        _training(runs),
        _sizes(runs),
        _similarity(runs, names),
        _singular_values(runs, names),
    )
    return [chart for chart in drawn if chart.panels or chart.told]


def write(folder: Path, drawn: list[Chart]) -> list[str]:
    """Write each chart as PNG and PDF.

    Args:
        folder (`Path`): made where missing.
        drawn (`list[Chart]`): of `charts`; those that are words alone have no file.

    Returns:
        Names of the files, without their endings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [chart for chart in drawn if chart.panels]
    for chart in drawn:
        columns = min(_COLUMNS, len(chart.panels))
        rows = -(-len(chart.panels) // columns)
        width, height = np.max([panel.size for panel in chart.panels], axis=0) * 1.2
        with rc_context(_STYLE):
            figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
            axes = figure.subplots(rows, columns, squeeze=False).flatten()
            for axis, panel in zip(axes, chart.panels, strict=False):
                panel.draw(axis)
                axis.set_title(_plain(" · ".join(filter(None, (panel.title, panel.run)))), fontsize=8)
            for axis in axes[len(chart.panels) :]:
                axis.set_axis_off()
            if chart.scale:
                chart.scale.bar(figure, axes, "vertical")
            for suffix in ("png", "pdf"):
                figure.savefig(folder / f"{chart.key}.{suffix}", dpi=200)
    return [chart.key for chart in drawn]


def _nats(runs: list[Run], names: dict[str, str]) -> Chart:
    maps, told = [], []
    for run in runs:
        cells = {  # short name -> layer -> nats
            names[name]: {depth.layer: depth.nats for depth in kind.depths}
            for name, kind in run.kinds.items()
            if any(depth.nats is not None for depth in kind.depths)
        }
        if cells:
            maps.append((run, cells))
            told.append(f"{_of(runs, run)}{gates_in_words(run.depths())}.")
    most = max((n for _, cells in maps for row in cells.values() for n in row.values() if n), default=1.0)
    panels = []
    for run, cells in maps:
        layers = sorted({layer for row in cells.values() for layer in row}, key=_numbers)
        room = zip(_CELL, (len(layers), len(cells)), _LABELS, _LARGEST, strict=True)
        size = tuple(min(cell * count + labels, largest) for cell, count, labels, largest in room)
        draw = _nats_map(cells, layers, most)
        panels.append(Panel("nats of each module", "nats", draw, size, _name(runs, run)))
    text = (
        "A cell is one module. Its nats, ½ log(1 + 1/α) summed over its directions, are the most that they can pass about the "
        "input through the noise that training has put on them. Dark: the labels held the gates open. Pale: the run did without, "
        "and `structlora export --keep` drops these directions first."
    )
    scale = Scale(_NATS, 0, most, "nats")
    return Chart("nats", "What the gates let through", text, told, panels, scale)


def _similarity(runs: list[Run], names: dict[str, str]) -> Chart:
    panels, told = [], []
    for run, kind, short in _by_kind(runs, names):
        if kind.similarity is not None and len(kind.depths) > 1:
            panels.append(Panel(short, kind.name, _map(kind), _MAP, _name(runs, run)))
    for run in runs:
        means = {}
        for name, kind in run.kinds.items():
            known = [depth.similarity for depth in kind.depths if depth.similarity is not None]
            if known:
                means[names[name]] = float(np.mean(known))
        if means:
            most, least = max(means, key=means.get), min(means, key=means.get)
            told.append(
                f"{_of(runs, run)}neighbouring layers learned most alike in {most} (mean cosine {means[most]:.2f})"
                + (
                    f", least in {least} ({means[least]:.2f})."
                    if f"{means[least]:.2f}" != f"{means[most]:.2f}"
                    else "."
                )
            )
        told += [
            f"{_of(runs, run)}no map of {', '.join(lacking)}: {why}."
            for why, lacking in _unmapped(run, names).items()
        ]
    text = (
        "Cosine of what the updates of two layers read from the residual stream, or write to it, whatever the order of their "
        "directions. Red near the diagonal: neighbouring layers learned alike. White: each learned its own."
    )
    return Chart("similarity", "Similarity over depth", text, told, panels, Scale(_COSINES, 0, 1, "cosine"))


def _unmapped(run: Run, names: dict[str, str]) -> dict[str, list[str]]:
    """Why kinds of a run have no map of similarity -> their short names."""
    without = "no structlora.safetensors beside it says where lora_A began, and so what it learned"
    lacking: dict[str, list[str]] = {}
    for name, kind in run.kinds.items():
        if len(kind.depths) == 1:
            lacking.setdefault("there is one layer of it", []).append(names[name])
        elif kind.similarity is None:
            why = "neither of its sides can be compared across depth" if run.saved.maps else without
            lacking.setdefault(why, []).append(names[name])
    return lacking


def _singular_values(runs: list[Run], names: dict[str, str]) -> Chart:
    shown, told = {name: [] for name in names}, []
    for _, kind, _ in _by_kind(runs, names):
        shown[kind.name] += kind.singular_values
    panels = [
        Panel(short, kind.name, _spectrum(kind, shown[kind.name]), _CHART, _name(runs, run))
        for run, kind, short in _by_kind(runs, names)
    ]
    for run in runs:
        rows = [row for kind in run.kinds.values() for row in kind.coverage]
        needed = np.mean([1 + sum(share < 0.9 for share in row[:-1]) for row in rows])
        rank = np.mean([len(row) for row in rows])
        told.append(
            f"{_of(runs, run)}{needed:.1f} of {rank:.3g} directions of a module hold 90 % of its update's squared norm, on average."
        )
    text = (
        "Of the update as it is added to the weight, on a logarithmic axis; a curve for each layer, from the first (violet) to the "
        "last (yellow). A steep curve: few directions do the work, and a smaller r would do."
    )
    return Chart("singular_values", "Singular values", text, told, panels)


def _sizes(runs: list[Run]) -> Chart:
    values = {}  # what is on the y axis -> lines
    told = []
    for run, colour in zip(runs, RUN_COLOURS, strict=False):
        curves = run.curves
        measure, points = size_curve(run.saved)
        if points:
            order = "openness" if run.saved.openness else "norm"
            curves = [*curves, SizeCurve(f"{_SHARE}{measure}", {order: points})]
        for curve in curves:
            at_quarter = []
            for (order, points), line in zip(curve.orders.items(), _LINES, strict=False):
                label = " · ".join(filter(None, (_name(runs, run), order)))
                values.setdefault(curve.value, []).append((label, points, colour, line))
                at = _at(points, 0.25)
                share = f"{100 * at:.0f} % of {curve.value.removeprefix(_SHARE)}"
                is_share = curve.value.startswith(_SHARE)
                at_quarter.append(f"{share if is_share else f'{curve.value} {at:.3g}'} by {order}")
            for level, height in curve.levels.items():
                label = " · ".join(filter(None, (_name(runs, run), level)))
                values[curve.value].append((label, [(0, height), (1, height)], _GREY, "-"))
            told.append(f"{_of(runs, run)}a quarter of the directions has {', '.join(at_quarter)}.")
    text = "What is left of an adapter with fewer directions, chosen over the whole model. " + (
        "Information and loss are those of the rows given."
        if any(run.curves for run in runs)
        else "Give some rows with `--data` to see the loss at each size: norms do not tell what a task needs."
    )
    panels = []
    for value, lines in values.items():
        limits = {"xlim": (0, 1.02), **({"ylim": (0, 1.03)} if value.startswith(_SHARE) else {})}
        draw = _lines(lines, xlabel="share of the directions kept", **limits)
        panels.append(Panel(value, value, draw, _WIDE))
    return Chart("size", "What a smaller adapter keeps", text, told, panels)


def _training(runs: list[Run]) -> Chart:
    panels = []
    for key, title in _CURVES.items():
        lines = []
        for run, colour in zip(runs, RUN_COLOURS, strict=False):
            points = [(e["step"], e[key]) for e in run.history if isinstance(e.get(key), (int, float))]
            if points:
                lines.append(("", points, colour, "-"))
        if lines:
            panels.append(Panel(title, key, _lines(lines, xlabel="step"), _CHART))
    told = []
    for run in runs:
        train, held_out = final_losses(run.history)
        if train is not None:
            told.append(
                f"{_of(runs, run)}training ended at a loss of {train:.3g}"
                + ("." if held_out is None else f", held out {held_out:.3g}: {_gap(train, held_out)}.")
            )
    text = "From the Trainer's log. Where gates have noise, training losses are with it; held-out ones are without."
    return Chart("training", "Training", text, told, panels)


def _gap(train: float, held_out: float) -> str:
    if held_out > 1.2 * train:
        return (
            "it fits its examples better than new ones, so fewer steps, more data or a smaller rate may help"
        )
    return "new examples fare about as well as those trained on"


def _nats_map(cells: dict[str, dict], layers: list[str], most: float) -> Callable[[Axes], None]:
    """Nats of each kind (rows) and layer (columns); nothing where a layer has no such module."""

    def draw(axis: Axes) -> None:
        values = np.array([[row.get(layer) for layer in layers] for row in cells.values()], dtype=float)
        edges = (np.arange(len(side) + 1) - 0.5 for side in (layers, cells))
        axis.pcolormesh(*edges, values, cmap=_NATS, vmin=0, vmax=most, edgecolors="white", linewidth=0.6)
        every = -(-len(layers) // 32)
        axis.set_xticks(range(0, len(layers), every), layers[::every])
        axis.set_yticks(range(len(cells)), map(_plain, cells))
        axis.invert_yaxis()
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set(xlabel="layer")

    return draw


def _map(kind: KindReport) -> Callable[[Axes], None]:
    """Cosines of all pairs of a kind's layers."""
    labels = [depth.layer for depth in kind.depths]

    def draw(axis: Axes) -> None:
        cosines = np.array(kind.similarity, dtype=float)  # NaN for None
        axis.imshow(cosines, interpolation="none", cmap=_COSINES, vmin=0, vmax=1, aspect="auto")
        every, fewer = -(-len(labels) // 16), -(-len(labels) // 5)
        axis.set_yticks(range(0, len(labels), every), labels[::every])
        axis.set_xticks(range(0, len(labels), fewer), labels[::fewer])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set(xlabel="layer")

    return draw


def _spectrum(kind: KindReport, shown: list[list[float]]) -> Callable[[Axes], None]:
    """Singular values on axes that have room for all that are shown side by side, those of both runs."""
    positive_shown = [value for row in shown for value in row if value > 0]
    longest = max(map(len, shown))

    def draw(axis: Axes) -> None:
        for depth, row in zip(kind.depths, kind.singular_values, strict=True):
            shade = depth.depth / max(len(kind.depths) - 1, 1)
            positive = [value if value > 0 else np.nan for value in row]
            alone = {"marker": "o", "markersize": 3} if len(row) == 1 else {}
            axis.plot(
                range(1, len(row) + 1), positive, color=colormaps["viridis"](shade), linewidth=1, **alone
            )
        axis.set_xlim(0.5, longest + 0.5)
        if positive_shown:
            axis.set(yscale="log", ylim=(min(positive_shown) / 1.3, max(positive_shown) * 1.3))
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(axis="y")
        axis.set(xlabel="singular value")

    return draw


def _lines(lines: list[tuple], **axes) -> Callable[[Axes], None]:
    """(Label, points, colour, line style) each; few points are marked."""

    def draw(axis: Axes) -> None:
        for label, points, colour, line in lines:
            marker = {"marker": "o", "markersize": 3} if len(points) < 12 else {}
            axis.plot(*zip(*points, strict=True), color=colour, linestyle=line, label=_plain(label), **marker)
        axis.set(**axes)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=axes["xlabel"] == "step"))
        axis.grid()
        if any(label for label, *_ in lines):
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.25)}  # below, where no curve is
            axis.legend(frameon=False, fontsize=6, ncols=-(-len(lines) // 4), columnspacing=1, **place)

    return draw


def _by_kind(runs: list[Run], names: dict[str, str]) -> Iterator[tuple[Run, KindReport, str]]:
    """Each kind of each run with its short name, the runs of one kind together."""
    for name, short in names.items():
        yield from ((run, run.kinds[name], short) for run in runs if name in run.kinds)


def _name(runs: list[Run], run: Run) -> str:
    """A run's name where there are two."""
    return run.name if len(runs) > 1 else ""


def _plain(label: str) -> str:
    """A label that matplotlib shows as it is: it reads $ as mathematics, and hides what begins with _."""
    return f" {label}".replace("$", r"\$")


def _of(runs: list[Run], run: Run) -> str:
    return f"{run.name}: " if len(runs) > 1 else ""


def _numbers(layer: str) -> list[int]:
    """What layers are sorted by: "10" comes after "9"."""
    return [int(number) for number in layer.split(".") if number]


def _at(points: list[tuple[float, float]], share: float) -> float:
    return float(np.interp(share, *zip(*sorted(points), strict=True)))


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # In a page: names of elements would be taken twice, and an `svg` needs no namespaces.
    return re.sub(r' (xmlns(:xlink)?|version)="[^"]*"|(?<=<g) id="[^"]*"', "", text).replace(
        "<svg", '<svg role="img"', 1
    )
