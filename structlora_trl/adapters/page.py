"""A page about one run or two: one HTML file with inline SVG, which needs no network and no other file."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path

from ..errors import StructLoRAError
from .figures import RUN_COLOURS, Run, charts
from .inspecting import contents, final_losses, held_out_rows, peak_learning_rate, short_names, training_data

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
    """Write the page: facts, which run did better, all charts with a sentence each, a table of modules.

    Args:
        path (`str` or `Path`): the HTML file; its folder is made where missing.
        runs (`list[Run]`): one, or two side by side.
    """
    facts = {name: [get(run) for run in runs] for name, get in _FACTS.items()}
    heads, rows = _table(runs)
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
        lowest={_HELD_OUT: _lowest(facts[_HELD_OUT])},
        verdict=_verdict(runs),
        charts=charts(runs),
        heads=heads,
        rows=rows,
    )
    path.write_text(page, encoding="utf-8")


def _verdict(runs: list[Run]) -> str:
    """Which run did better, as far as their logs tell."""
    losses = [final_losses(run.history)[1] for run in runs]
    if None in losses:
        lacking = " and ".join(run.name for run, loss in zip(runs, losses, strict=True) if loss is None)
        return (
            f"The log of {lacking} has no held-out loss, which alone tells whether a run did well: train with "
            "`test_split_size: 0.1` and `eval_strategy: steps`."
        )
    if len(runs) == 1:
        return f"Held-out loss at the end: {losses[0]:.4g}. Set another run beside it with `--against`."
    best, other = sorted(range(2), key=losses.__getitem__)
    lower, higher = f"{losses[best]:.4g}", f"{losses[other]:.4g}"
    if lower == higher:
        return f"Held-out loss at the end: {lower} in both runs."
    return (
        f"Held-out loss at the end: {runs[best].name} is lower by {losses[other] - losses[best]:.3g} ({lower} against "
        f"{higher}). One seed each: repeat both with another before you believe it."
    )


def _lowest(values: list) -> object:
    known = [value for value in values if value is not None]
    return min(known) if len(known) > 1 else None


def _table(runs: list[Run]) -> tuple[list[str], list[tuple]]:
    """Heads and rows of the table of modules: a row's kind in full and in short, layer and figures."""
    names = short_names([*{name: None for run in runs for name in run.kinds}])
    found = {}
    for index, run in enumerate(runs):
        for name in names:
            for depth in run.kinds[name].depths if name in run.kinds else ():
                found.setdefault((name, depth.layer), [None] * len(runs))[index] = (run.kinds[name], depth)
    heads = [head if len(runs) == 1 else f"{head}, {run.name}" for head in _COLUMNS for run in runs]
    rows = [
        (
            name,
            names[name],
            layer,
            [get(*pair) if pair else None for get in _COLUMNS.values() for pair in pairs],
        )
        for (name, layer), pairs in found.items()
    ]
    return ["kind", "layer", *heads], rows


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


_HELD_OUT = "held-out loss at the end"  # training losses of StructLoRA are with noise: not to be compared
_FACTS: dict[str, Callable[[Run], object]] = {
    "base model": _base_model,
    "data": lambda run: training_data(run.saved),
    "r": lambda run: _ranks(run),
    "alpha": lambda run: run.saved.lora.lora_alpha,
    "modules": lambda run: len(run.depths()),
    "directions": lambda run: sum(depth.rank for depth in run.depths()),
    "parameters": lambda run: sum(part.numbers for part in contents(run.saved.tensors)),
    "bytes": lambda run: sum(part.bytes for part in contents(run.saved.tensors)),
    "learning rate": lambda run: peak_learning_rate(run.saved),
    "steps": lambda run: run.saved.step or (run.history[-1]["step"] if run.history else None),
    "training loss at the end": lambda run: final_losses(run.history)[0],
    _HELD_OUT: lambda run: final_losses(run.history)[1],
    "held-out rows": lambda run: held_out_rows(run.history),
    "noise": _option("noise"),
    "coordinator": _option("coordinator"),
    "directions that add something": lambda run: sum(depth.kept for depth in run.depths()),
    "mean effective rank": lambda run: sum(d.effective_rank for d in run.depths()) / len(run.depths()),
    "folder": lambda run: str(run.saved.folder),
    "state and log from": lambda run: (
        str(run.saved.run_folder) if run.saved.run_folder != run.saved.folder else None
    ),
}
_COLUMNS: dict[str, Callable] = {
    "adds": lambda kind, depth: depth.kept,
    "rank": lambda kind, depth: depth.rank,
    "eff. rank": lambda kind, depth: depth.effective_rank,
    "norm": lambda kind, depth: depth.norm,
    "coherence": lambda kind, depth: depth.coherence,
    "stream": lambda kind, depth: depth.stream,
    "semantic": lambda kind, depth: (
        None
        if depth.semantic is None
        else " ".join(kind.depths[other].layer for other in depth.semantic) or "none"
    ),
}


def _with_code(text: str) -> Markup:
    """Text with what stands between backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _shown(value) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    return (
        f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    )
