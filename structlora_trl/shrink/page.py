"""A page about one run or two: one HTML file with its pictures in it, which needs no network and no other file."""

from __future__ import annotations

import os
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from .figures import RUN_COLOURS, Run, charts
from .inspecting import command_facts, contents, final_losses, mean_effective_rank, module_table


def write_page(path: str | Path, runs: list[Run]) -> None:
    """Write the page: which run did better, all charts, facts, a table of modules.

    Args:
        path (`str` or `Path`): the HTML file; its folder is made where missing.
        runs (`list[Run]`): one, or two side by side.
    """
    facts = [_facts(run) for run in runs]
    templates = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("page.html.j2").render(
        runs=[*zip(runs, RUN_COLOURS, strict=False)],
        verdict=_verdict(runs),
        charts=charts(runs),
        facts={name: values for name in facts[0] if any(values := [of_run[name] for of_run in facts])},
        tables=[
            module_table(run.kinds).to_html(index_names=False, na_rep="-", float_format="{:.3g}".format)
            for run in runs
        ],
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page, encoding="utf-8")


def _verdict(runs: list[Run]) -> str:
    """Which run did better, as far as their logs tell."""
    losses = [final_losses(run.history)[1] for run in runs]
    if silent := [run.name for run, loss in zip(runs, losses, strict=True) if loss is None]:
        return (
            f"No log beside {' and '.join(silent)} has a held-out loss, which alone tells whether a run did well: train with "
            "test_split_size: 0.1 and eval_strategy: steps. --data ROWS.jsonl shows the loss at each size."
        )
    if len(runs) == 1:
        return f"Held-out loss at the end: {losses[0]:.4g}. Set another run beside it with --against."
    steps = [run.history[-1]["step"] for run in runs]
    each = [f"{r.name} {loss:.4g} after {n:,} steps" for r, loss, n in zip(runs, losses, steps, strict=True)]
    warning = (
        "Runs of different lengths cannot be compared."
        if steps[0] != steps[1]
        else "One seed each: repeat both with another before you believe a difference."
    )
    return f"Held-out loss at the end: {', '.join(each)}. {warning}"


def _facts(run: Run) -> dict[str, object]:
    lora, config, given = run.saved.lora, run.saved.config, command_facts(run.saved.folder)
    base = lora.base_model_name_or_path or ""
    ranks = [depth.rank for depth in run.depths]
    training, held_out = final_losses(run.history)
    return {
        "base model": Path(base).name if os.path.isabs(base) else base,  # a page is for others, too
        "data": ", ".join(given.get("data") or ()),
        "r": " to ".join(map(str, sorted({min(ranks), max(ranks)}))),
        "alpha": lora.lora_alpha,
        "modules": len(ranks),
        "directions": sum(ranks),
        "parameters": sum(part.numbers for part in contents(run.saved.tensors)),
        "learning rate": given.get("learning_rate")
        or max((e.get("learning_rate", 0) for e in run.history), default=0),
        "steps": run.history[-1]["step"] if run.history else run.saved.step,
        "training loss at the end": training,
        "held-out loss at the end": held_out,
        "gates": config and config.gates,
        "beta": config and config.beta,
        "coordinator": config and config.coordinator,
        "mean effective rank": mean_effective_rank(run.depths),
        "folder": str(run.saved.folder),
    }
