"""`structlora inspect`: what an adapter has learned, by kind of module and depth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import refuse_unwritable, refuse_unwritable_file, refusing, writing
from ..local_data import local_path
from .arguments import parser_of
from .early import refuse_missing_model
from .export import in_words, refuse_missing

if TYPE_CHECKING:
    from ..shrink.inspecting import KindReport
    from ..shrink.load_adapter import Saved

_DESCRIPTION = """Look into a saved adapter: a run's output, a checkpoint of any engine, or any LoRA adapter of PEFT.

First come the last losses of the log, where the bytes of the file are, and what each server needs to load it (`structlora
export --for`). Then a row for each module:
  rank            of the module's adapter
  kept            directions that add something: all but those that `keep` closed while training
  effective_rank  exp of the entropy of the normalised singular values of the update BA
  norm            Frobenius norm of the update as it is added to the weight
  similarity      mean cosine with the neighbouring depths of what the update reads from the residual stream, or writes to
                  it, as a subspace: from 0 to 1, whatever the order and mixture of the directions
  semantic        layers joined to this one by semantic edges
  openness        mean openness of its gates, from 0 to 1
  closed          directions of openness below 1/2
  nats            the most that the directions pass about their input through the noise of their gates, together
Columns without values are left out: gates need structlora_gates.safetensors in the same folder; semantic edges, and the
similarity of modules that read the residual stream, structlora.safetensors.

--against FOLDER shows rank, effective rank and norm of another adapter beside this one's, such as the one that it was
made of. --html FILE writes all figures as one page; with --data, it shows what smaller adapters would keep of the
information that the rows hold about each direction, and the loss at each size (`structlora export --rank` and `--keep`).
"""
_EXAMPLES = """examples:
  structlora inspect out
  structlora inspect out/checkpoint-500 --plot figures     # needs matplotlib: pip install "structlora-trl[plot]"
  structlora inspect out --html report.html --against lora  # a page to look at, with two runs side by side
  structlora inspect out --html report.html --data rows.jsonl
  structlora inspect out --json | jq '.kinds[0].depths[0]'
"""


def run(command: str, arguments: list[str]) -> None:
    """Print a table, or JSON; with `--plot`, write figures; with `--html`, a page.

    Raises:
        StructLoRAError: nothing there to read; or figures are asked for and matplotlib or jinja2 is missing, or
            a file stands where a folder is to be written, or a folder where the page is.
    """
    parser = parser_of(command, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("adapter", type=Path, help="folder of the adapter or checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write figures (PNG and PDF) to this folder")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page: one HTML file, with all figures in it"
    )
    parser.add_argument(
        "--against", type=Path, metavar="FOLDER", help="another adapter, beside this one in table and figures"
    )
    parser.add_argument(
        "--data", metavar="ROWS", help="rows to measure smaller adapters on, for the figures: as of `export`"
    )
    parser.add_argument("--split", metavar="NAME", help="split of --data; default: test, validation or train")
    parser.add_argument(
        "--base", metavar="MODEL", help="base model for --data; default: the one named in the adapter"
    )
    given = parser.parse_args(arguments)
    is_drawn = given.html or given.plot
    if given.data and not is_drawn:
        parser.error("--data needs --html or --plot")
    if (given.base or given.split) and not given.data:
        parser.error("--base and --split need --data")
    if given.against and given.json and not is_drawn:
        parser.error("--against is for a table or figures; run `structlora inspect --json` on each adapter")
    folders = [folder for folder in (given.adapter, given.against) if folder]
    for folder in folders:
        refuse_missing(folder)
    if given.html:
        refuse_unwritable_file(given.html)
    if given.plot:
        refuse_unwritable(given.plot)
    if given.data:
        local_path(given.data)  # a file that is not there is told here
    if given.base:
        given.base = refuse_missing_model(given.base, "--base")
    # After the arguments: these load torch and PEFT. Before the work: a missing library is told at once.
    if is_drawn:
        with refusing(
            "drawing", "matplotlib and jinja2", 'install them: `pip install "structlora-trl[plot]"`'
        ):
            from ..shrink.figures import Run, charts
            from ..shrink.page import write_page
    from ..shrink.inspecting import contents, report
    from ..shrink.load_adapter import read_saved
    from ..shrink.servers import told
    from ..shrink.trial import information_curves

    adapters = [read_saved(folder) for folder in folders]
    saved, kinds = adapters[0], [report(adapter) for adapter in adapters]
    parts, servers = contents(saved.tensors), told(saved.lora, saved.tensors)
    if given.json:
        facts = {
            "adapter": str(given.adapter),
            "step": saved.step,
            "options": saved.config.options() if saved.config else None,
            "file": [asdict(part) for part in parts],
            "servers": servers,
            "kinds": [asdict(kind) for kind in kinds[0]],
        }
        print(json.dumps(facts, indent=2))
    else:
        print("\n".join(map(summary, adapters, kinds)))
        sizes = (f"{part.what} {in_words(part.bytes, 'B')} ({part.dtype})" for part in parts)
        print(f"Bytes: {'; '.join(sizes)}.")
        print(*(f"{name}: {line}." for name, line in servers.items()), table(*kinds), sep="\n")
    if not is_drawn:
        return
    names = [folder.resolve().name for folder in folders]
    names = names if len({*names}) == len(names) else [*map(str, folders)]
    runs = []
    for name, adapter in zip(names, adapters, strict=True):
        curves = information_curves(adapter, given.data, given.base, given.split) if given.data else []
        runs.append(Run(name, adapter, curves))
    lines = []
    if given.plot:
        drawn = charts(runs)
        with writing(given.plot) as folder:
            for chart in drawn:
                chart.write(folder)
        lines.append(f"\nWrote {', '.join(chart.key for chart in drawn)} to {given.plot}.")
    if given.html:
        with writing(given.html.parent) as folder:
            write_page(folder / given.html.name, runs)
        lines.append(f"\nWrote {given.html}.")
    if not given.json:
        print(*lines, sep="\n")


def summary(saved: Saved, kinds: list[KindReport]) -> str:
    """What matters most, in a few lines: what the adapter is, its directions, the last losses of its log."""
    from ..shrink.inspecting import final_losses, gates_in_words, log_history, mean_effective_rank

    config = saved.config
    lines = [f"{saved.folder}: a LoRA adapter without StructLoRA's state"]
    if config:
        lines = [
            f"{saved.folder}: StructLoRA after {saved.step} steps, gates {config.gates}, coordinator {config.coordinator} "
            f"({config.edges})"
        ]
    depths = [depth for kind in kinds for depth in kind.depths]
    directions, kept = sum(depth.rank for depth in depths), sum(depth.kept for depth in depths)
    line = f"{directions:,} directions in {len(depths):,} modules, mean effective rank {mean_effective_rank(depths):.2f}"
    if kept < directions:
        line += f"; {kept:,} of the directions add something"
    for name, loss in zip(("training", "held-out"), final_losses(log_history(saved.folder)), strict=True):
        line += "" if loss is None else f"; {name} loss {loss:.4g}"
    return "\n".join([*lines, f"{line}.", *filter(None, [gates_in_words(depths)])])


def table(kinds: list[KindReport], others: Sequence[KindReport] = ()) -> str:
    """Text for a terminal; with rank, effective rank and norm of another adapter's modules of the same names."""
    from ..shrink.inspecting import module_table

    shown = module_table(kinds).drop(columns=["kind", "layer", "depth"])
    if others:
        beside = module_table(others)[["rank", "effective_rank", "norm"]]
        shown = shown.join(beside.add_suffix("_against"))
    return shown.to_string(index_names=False, na_rep="-", float_format="{:.3g}".format)
