"""A page about one run or two: one HTML file with inline SVG, which needs no network and no other file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from .inspecting import KindReport, log_history, report, short_names
from .load_adapter import Saved
from .svg import RED_BLUE, VIRIDIS, Line, Scale, chart, heat_map, legend

_RUN_COLOURS = ("#c2410c", "#1d4ed8")
# What the Trainer logs -> the title of its chart.
_CURVES = {
    "loss": "Training loss",
    "eval_loss": "Evaluation loss",
    "structlora/drift_energy": "Drift energy",
    "structlora/effective_rank": "Effective rank",
    "structlora/gate_openness": "Gate openness",
    "structlora/gradient_cosine": "Cosine of neighbouring gradients",
    "structlora/stream_cosine": "Cosine of neighbours in the residual stream",
}
# Titles of the maps of gates, what of a `DepthReport` they show, and what each gate is of.
_GATES = (("Gates", "gates", "direction"), ("Gates of heads and experts", "groups", "head or expert"))
_STYLE = """
:root{--ink:#1f2328;--soft:#59636e;--rule:#d1d9e0;--ground:#fff;--panel:#f6f8fa}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9198a1;--rule:#3d444d;--ground:#0d1117;--panel:#151b23}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--ground);max-width:1180px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0 0 .8rem}h2{font-size:1.15rem;margin:2rem 0 .3rem;border-top:1px solid var(--rule);padding-top:1rem}
p{margin:.2rem 0 .7rem;color:var(--soft);max-width:75ch}
.panels{display:flex;flex-wrap:wrap;gap:14px}
figure{margin:0;padding:10px 12px;background:var(--panel);border:1px solid var(--rule);border-radius:6px}
figcaption{font-weight:600;font-size:.85rem;margin-bottom:6px}figure div{display:flex;gap:18px;align-items:flex-start}
figure span{display:block;font-size:.75rem;color:var(--soft)}
svg{display:block}svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
.line{fill:none;stroke-width:1.6}.grid{stroke:var(--rule)}.mark{stroke:var(--ink);stroke-width:1.5}
.facts,.scroll table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}th,td{padding:2px 10px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th:first-child,td:first-child{text-align:left}.scroll th{cursor:pointer;color:var(--soft)}
.scroll th[aria-sort=ascending]::after{content:" \\2191"}.scroll th[aria-sort=descending]::after{content:" \\2193"}
.key{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.4em}
"""
_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.querySelectorAll("th")], body = table.tBodies[0], order = new Intl.Collator("en", {numeric: true});
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const compare = (a, b) => isNaN(a) || isNaN(b) ? order.compare(a, b) : a - b;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
    body.append(...[...body.rows].sort((a, b) => down * compare(value(a), value(b))));
  }));
}
"""


@dataclass
class Run:
    """What the page shows of a run.

    Args:
        name (`str`): of the run.
        saved (`Saved`): what it left.
        kinds (`dict[str, KindReport]`): by name.
        history (`list[dict]`): the Trainer's log.
    """

    name: str
    saved: Saved
    kinds: dict[str, KindReport]
    history: list[dict]

    @classmethod
    def of(cls, name: str, saved: Saved) -> Run:
        """With its figures computed.

        Raises:
            StructLoRAError: the Trainer's log is damaged.
        """
        return cls(name, saved, {kind.name: kind for kind in report(saved)}, log_history(saved.folder))


def write_page(path: str | Path, runs: list[Run]) -> None:
    """Write the page: facts, gates, similarity over depth, singular values, curves of the training, a table of all modules.

    Args:
        path (`str` or `Path`): the HTML file; its folder is made where missing.
        runs (`list[Run]`): one, or two side by side.
    """
    names = short_names([*{name: None for run in runs for name in run.kinds}])
    gates = [_gates(runs, names, *kinds) for kinds in _GATES]
    parts = [_facts(runs), *gates, _similarity(runs, names), _singular_values(runs, names), _curves(runs)]
    body = "\n".join([*filter(None, parts), _table(runs, names)])
    title = " against ".join(escape(run.name) for run in runs)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>\n{body}\n<script>{_SCRIPT}</script></body></html>\n",
        encoding="utf-8",
    )


def _facts(runs: list[Run]) -> str:
    rows = {name: [_shown(get(run)) for run in runs] for name, get in _FACTS.items()}
    heads = "".join(f"<th>{_key(i, run)}</th>" for i, run in enumerate(runs))
    lines = [
        f"<tr><td>{name}</td>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for name, values in rows.items()
    ]
    return f'<table class="facts"><tr><th></th>{heads}</tr>{"".join(lines)}</table>'


def _gates(runs: list[Run], names: dict[str, str], title: str, attribute: str, gated: str) -> str:
    def of_kind(kind: KindReport) -> list | None:
        rows = [getattr(depth, attribute) for depth in kind.depths]
        return None if rows[0] is None else rows

    maps = [_of_kinds(run, of_kind) for run in runs]
    values = [gate for run in maps for rows in run.values() for row in rows for gate in row]
    if not values:
        return ""
    scale = Scale(min(values), max(values), VIRIDIS)
    starts = {run.saved.maps[0].config.gate_init for run, gates in zip(runs, maps, strict=True) if gates}
    marks = {f"start {start:g}": start for start in sorted(starts)}
    text = f"Probability that each {gated} is open, from the least that happened to the most."
    return _section(title, text, legend(scale, marks) + _maps(runs, names, maps, scale, gated))


def _similarity(runs: list[Run], names: dict[str, str]) -> str:
    maps = [_of_kinds(run, lambda kind: kind.similarity if len(kind.depths) > 1 else None) for run in runs]
    if not any(maps):
        return ""
    scale = Scale(-1, 1, RED_BLUE)
    text = "Cosine of the updates of two layers, on the side of the module that can be compared across depth."
    return _section("Similarity over depth", text, legend(scale, {}) + _maps(runs, names, maps, scale, "layer"))


def _singular_values(runs: list[Run], names: dict[str, str]) -> str:
    figures = []
    for name, short in names.items():
        having = [run for run in runs if name in run.kinds]
        values = [value for run in having for row in run.kinds[name].singular_values for value in row if value > 0]
        span = (min(values), max(values)) if values else None
        charts = [_of_run(runs, run, _spectrum(run.kinds[name], span)) for run in having]
        figures.append(_figure(name, short, charts))
    text = (
        "Of the update as it is added to the weight, on a logarithmic axis; a curve for each layer, from the first (violet) to "
        "the last (yellow)."
    )
    return _section("Singular values", text, _panels(figures))


def _spectrum(kind: KindReport, span: tuple[float, float] | None) -> str:
    scale = Scale(0, max(len(kind.depths) - 1, 1), VIRIDIS)
    lines = [
        Line(f"layer {depth.layer}", range(1, len(row) + 1), row, scale.colour(scale.shade(depth.depth)))
        for depth, row in zip(kind.depths, kind.singular_values, strict=True)
    ]
    return chart(lines, "singular value", logarithmic=True, span=span)


def _curves(runs: list[Run]) -> str:
    figures = []
    for key, title in _CURVES.items():
        lines = []
        for index, run in enumerate(runs):
            points = [(e["step"], e[key]) for e in run.history if isinstance(e.get(key), (int, float))]
            if points:
                lines.append(Line(run.name, *zip(*points, strict=True), _RUN_COLOURS[index]))
        if lines:
            figures.append(_figure(title, title, [chart(lines, "step")]))
    text = "From the Trainer's log. " + " ".join(_key(index, run) for index, run in enumerate(runs))
    return _section("Training", text, _panels(figures)) if figures else ""


def _table(runs: list[Run], names: dict[str, str]) -> str:
    lines, rows = [], {}
    for index, run in enumerate(runs):
        for name in names:
            for depth in run.kinds[name].depths if name in run.kinds else ():
                rows.setdefault((name, depth.layer), [None] * len(runs))[index] = (run.kinds[name], depth)
    columns = {head: get for head, get in _COLUMNS.items() if head != "groups" or _grouped(runs)}
    heads = ["kind", "layer"]
    heads += [head if len(runs) == 1 else f"{head}, {escape(run.name)}" for head in columns for run in runs]
    for (name, layer), found in rows.items():
        cells = [f'<td title="{escape(name)}">{escape(names[name])}</td>', f"<td>{escape(layer)}</td>"]
        cells += [_cell(get(*pair) if pair else None) for get in columns.values() for pair in found]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    table = f'<table class="sortable"><thead><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr></thead>'
    text = "Click a column's head to sort by it. Norm: of the update as it is added to the weight."
    return _section("Modules", text, f'<div class="scroll">{table}<tbody>{"".join(lines)}</tbody></table></div>')


def _openness(depths, attribute: str = "gates") -> float | None:
    gates = [gate for depth in depths for gate in getattr(depth, attribute) or ()]
    return sum(gates) / len(gates) if gates else None


def _depths(run: Run) -> list:
    return [depth for kind in run.kinds.values() for depth in kind.depths]


def _grouped(runs: list[Run]) -> bool:
    """Whether heads or experts have gates in any run."""
    return any(depth.groups is not None for run in runs for depth in _depths(run))


def _option(name: str) -> Callable[[Run], object]:
    return lambda run: getattr(run.saved.maps[0].config, name) if run.saved.maps else None


_FACTS: dict[str, Callable[[Run], object]] = {
    "folder": lambda run: str(run.saved.folder),
    "steps": lambda run: run.saved.step,
    "filter": _option("filter"),
    "gate_init": _option("gate_init"),
    "coordinator": _option("coordinator"),
    "modules": lambda run: len(_depths(run)),
    "directions": lambda run: sum(depth.rank for depth in _depths(run)),
    "mean openness": lambda run: _openness(_depths(run)),
    "mean effective rank": lambda run: sum(d.effective_rank for d in _depths(run)) / len(_depths(run)),
}
_COLUMNS: dict[str, Callable] = {
    "openness": lambda kind, depth: _openness([depth]),
    "groups": lambda kind, depth: _openness([depth], "groups"),
    "eff. rank": lambda kind, depth: depth.effective_rank,
    "norm": lambda kind, depth: depth.norm,
    "coherence": lambda kind, depth: depth.coherence,
    "stream": lambda kind, depth: depth.stream,
    "semantic": lambda kind, depth: (
        None if depth.semantic is None else " ".join(kind.depths[other].layer for other in depth.semantic) or "none"
    ),
}


def _of_kinds(run: Run, get: Callable[[KindReport], list | None]) -> dict[str, list]:
    found = {name: get(kind) for name, kind in run.kinds.items()}
    return {name: rows for name, rows in found.items() if rows is not None}


def _maps(runs: list[Run], names: dict[str, str], maps: list[dict], scale: Scale, across: str) -> str:
    figures = []
    for name, short in names.items():
        drawn = []
        for run, rows in zip(runs, maps, strict=True):
            if name in rows:
                labels = [depth.layer for depth in run.kinds[name].depths]
                drawn.append(_of_run(runs, run, heat_map(rows[name], scale, labels, across)))
        if drawn:
            figures.append(_figure(name, short, drawn))
    return _panels(figures)


def _of_run(runs: list[Run], run: Run, drawing: str) -> str:
    return drawing if len(runs) == 1 else f"<div><section><span>{escape(run.name)}</span>{drawing}</section></div>"


def _figure(name: str, short: str, drawings: list[str]) -> str:
    return f'<figure><figcaption title="{escape(name)}">{escape(short)}</figcaption><div>{"".join(drawings)}</div></figure>'


def _panels(figures: list[str]) -> str:
    return f'<div class="panels">{"".join(figures)}</div>'


def _section(title: str, text: str, content: str) -> str:
    return f"<section><h2>{title}</h2><p>{text}</p>{content}</section>"


def _key(index: int, run: Run) -> str:
    return f'<i class="key" style="background:{_RUN_COLOURS[index]}"></i>{escape(run.name)}'


def _shown(value) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cell(value) -> str:
    exact = f' data-value="{value!r}"' if isinstance(value, float) else ""
    return f"<td{exact}>{escape(_shown(value))}</td>"
