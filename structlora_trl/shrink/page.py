"""A page about one run or two: one HTML file with inline SVG, which needs no network and no other file."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ..core.kinds import short_names
from ..errors import StructLoRAError
from .figures import RUN_COLOURS, Run, charts
from .inspecting import (
    contents,
    final_losses,
    held_out_rows,
    mean_effective_rank,
    peak_learning_rate,
    training_data,
)

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape
except ImportError as error:
    raise StructLoRAError(
        "no jinja2",
        "jinja2, which `--html` fills its page with",
        'install it: `pip install "structlora-trl[plot]"`, or leave `--html` out',
    ) from error


def write_page(path: str | Path, runs: list[Run]) -> None:
    """Write the page: which run did better, all charts with a sentence each, facts, a table of modules.

    Args:
        path (`str` or `Path`): the HTML file; its folder is made where missing.
        runs (`list[Run]`): one, or two side by side.
    """
    facts = {name: [get(run) for run in runs] for name, get in _FACTS.items()}
    columns, rows = _table(runs)
    templates = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"shown": _shown, "with_code": _with_code}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    page = templates.get_template("page.html.j2").render(
        runs=[*zip(runs, RUN_COLOURS, strict=False)],
        facts={name: values for name, values in facts.items() if any(value is not None for value in values)},
        verdict=_verdict(runs),
        charts=charts(runs),
        columns=columns,
        rows=rows,
    )
    path.write_text(page, encoding="utf-8")


def _verdict(runs: list[Run]) -> str:
    """Which run did better, as far as their logs tell; of adapters without a log, their sizes and losses."""
    losses = [final_losses(run.history)[1] for run in runs]
    if None in losses:
        return " ".join(_without_losses(runs, losses))
    if len(runs) == 1:
        return f"Held-out loss at the end: {losses[0]:.4g}. Set another run beside it with `--against`."
    steps = _last_steps(runs)
    if len({*steps}) > 1:
        each = (
            f"{r.name} {loss:.4g} after {n:,} steps" for r, loss, n in zip(runs, losses, steps, strict=True)
        )
        return f"Held-out loss at the end: {', '.join(each)}. Runs of different lengths cannot be compared."
    best, other = sorted(range(2), key=losses.__getitem__)
    lower, higher = f"{losses[best]:.4g}", f"{losses[other]:.4g}"
    if lower == higher:
        return f"Held-out loss at the end: {lower} in both runs."
    return (
        f"Held-out loss at the end: {runs[best].name} is lower by {losses[other] - losses[best]:.3g} ({lower} against "
        f"{higher}). One seed each: repeat both with another before you believe it."
    )


def _without_losses(runs: list[Run], losses: list[float | None]) -> Iterator[str]:
    """What stands in place of a verdict where a log lacks held-out losses, or there is none, as of an exported adapter."""
    without = [run.name for run in runs if not run.history]
    if without:
        yield _size(runs)
        yield from (
            f"Held-out loss of {run.name} at the end: {loss:.4g}."
            for run, loss in zip(runs, losses, strict=True)
            if loss is not None
        )
        measured = {run.name: curve for run in runs for curve in run.curves if curve.value == "loss"}
        if measured:
            at = [
                f"{name} {next(iter(curve.orders.values()))[-1][1]:.4g}" for name, curve in measured.items()
            ]
            base = next(iter(measured.values())).levels
            at += [f"{name} {loss:.4g}" for name, loss in base.items()]
            yield f"Loss on the rows of `--data`: {', '.join(at)}."
        else:
            yield (
                f"There is no training log beside {' and '.join(without)}: give `--data ROWS.jsonl` to see the loss at each size."
            )
    if silent := [run.name for run, loss in zip(runs, losses, strict=True) if run.history and loss is None]:
        yield (
            f"The log of {' and '.join(silent)} has no held-out loss, which alone tells whether a run did well: train with "
            "`test_split_size: 0.1` and `eval_strategy: steps`."
        )


def _size(runs: list[Run]) -> str:
    """How large an adapter is, or what the smaller of two has of the larger one."""

    def directions(run: Run) -> int:
        return sum(depth.rank for depth in run.depths())

    def own(run: Run) -> str:
        return f"{run.name} has {directions(run):,} directions in {len(run.depths()):,} modules"

    if len(runs) == 1:
        return f"{own(runs[0])}, of mean effective rank {mean_effective_rank(runs[0].depths()):.2f}."
    small, large = sorted(runs, key=directions)
    shares = {
        "directions": directions(small) / directions(large),
        "parameters": _parameters(small) / _parameters(large),
    }
    less = ", ".join(f"{100 * share:.0f}\N{NO-BREAK SPACE}% of the {what}" for what, share in shares.items())
    return f"{own(large)}, {own(small)}: {less}."


def _parameters(run: Run) -> int:
    return sum(part.numbers for part in contents(run.saved.tensors))


def _last_steps(runs: list[Run]) -> list[int]:
    """The steps at which logs end."""
    return [run.history[-1]["step"] for run in runs]


def _table(runs: list[Run]) -> tuple[list[str], list[tuple]]:
    """Columns and rows of the table of modules: a row's kind in full and in short, layer, and figures with their text.

    Columns that say nothing of these adapters are left out.
    """
    names = short_names([*{name: None for run in runs for name in run.kinds}])
    found = {}
    for index, run in enumerate(runs):
        for name in names:
            for depth in run.kinds[name].depths if name in run.kinds else ():
                found.setdefault((name, depth.layer), [None] * len(runs))[index] = (run.kinds[name], depth)
    columns = {  # its values: of each module, of each run
        head: [[get(*pair) if pair else None for pair in pairs] for pairs in found.values()]
        for head, get in _COLUMNS.items()
    }
    if columns["adds"] == columns["rank"]:
        del columns["adds"]
    columns = {
        head: rows
        for head, rows in columns.items()
        if any(value is not None for values in rows for value in values)
    }
    shown = {
        head: _alike([value for values in rows for value in values], _DECIMALS.get(head))
        for head, rows in columns.items()
    }
    rows = [
        (
            name,
            names[name],
            layer,
            [(value, shown[head](value)) for head, rows in columns.items() for value in rows[index]],
        )
        for index, (name, layer) in enumerate(found)
    ]
    return [*columns], rows


def _alike(values: list, decimals: int | None) -> Callable[[object], str]:
    """What shows each value of a column: numbers with as many decimals as are given, or as the smallest has with three digits."""
    sizes = [abs(value) for value in values if isinstance(value, float) and math.isfinite(value) and value]
    if not sizes:
        return _shown
    if decimals is None:
        decimals = max(0, 2 - math.floor(math.log10(min(sizes))))
    form = f".{decimals}f" if decimals <= 6 and max(sizes) < 1e6 else ".2e"
    return lambda value: format(value, form) if isinstance(value, float) and math.isfinite(value) else "-"


def _option(name: str) -> Callable[[Run], object]:
    return lambda run: getattr(run.saved.config, name) if run.saved.config else None


def _base_model(run: Run) -> str | None:
    """The base model's name: of a folder its last part, since the page is for others, too."""
    name = run.saved.lora.base_model_name_or_path
    is_path = name and (os.path.isabs(name) or name.startswith((".", "~")))
    return Path(os.path.abspath(name)).name if is_path else name


def _ranks(run: Run) -> str:
    ranks = {depth.rank for depth in run.depths()}
    return str(min(ranks)) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"


_FACTS: dict[str, Callable[[Run], object]] = {
    "base model": _base_model,
    "data": lambda run: training_data(run.saved),
    "r": lambda run: _ranks(run),
    "alpha": lambda run: run.saved.lora.lora_alpha,
    "modules": lambda run: len(run.depths()),
    "directions": lambda run: sum(depth.rank for depth in run.depths()),
    "parameters": _parameters,
    "bytes": lambda run: sum(part.bytes for part in contents(run.saved.tensors)),
    "learning rate": lambda run: peak_learning_rate(run.saved),
    "steps": lambda run: run.saved.step or (run.history[-1]["step"] if run.history else None),
    "training loss at the end": lambda run: final_losses(run.history)[0],
    "held-out loss at the end": lambda run: final_losses(run.history)[1],
    "held-out rows": lambda run: held_out_rows(run.history),
    "gates": _option("gates"),
    "beta": _option("beta"),
    "coordinator": _option("coordinator"),
    "directions that add something": lambda run: sum(depth.kept for depth in run.depths()),
    "mean effective rank": lambda run: mean_effective_rank(run.depths()),
    "folder": lambda run: str(run.saved.folder),
    "state and log from": lambda run: (
        str(run.saved.run_folder) if run.saved.run_folder != run.saved.folder else None
    ),
}
_COLUMNS: dict[str, Callable] = {
    "eff. rank": lambda kind, depth: depth.effective_rank,
    "norm": lambda kind, depth: depth.norm,
    "rank": lambda kind, depth: depth.rank,
    "adds": lambda kind, depth: depth.kept,
    "nats": lambda kind, depth: depth.nats,
    "openness": lambda kind, depth: depth.openness,
    "closed": lambda kind, depth: depth.closed,
    "similarity": lambda kind, depth: depth.similarity,
    "semantic": lambda kind, depth: (
        None
        if depth.semantic is None
        else " ".join(kind.depths[other].layer for other in depth.semantic) or "none"
    ),
}

_DECIMALS = {"eff. rank": 2, "nats": 2, "openness": 2, "similarity": 3}  # those of norms follow their size


def _with_code(text: str) -> Markup:
    """Text with what stands between backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _shown(value) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    return (
        f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    )
