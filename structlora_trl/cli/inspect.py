"""`structlora inspect`: what an adapter has learned, by kind of module and depth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import refuse_unwritable, refuse_unwritable_file, writing
from ..local_data import local_path
from .arguments import parser_of
from .early import refuse_missing_model
from .export import in_words, refuse_missing

if TYPE_CHECKING:
    from ..shrink.inspecting import KindReport
    from ..shrink.load_adapter import Saved

_DESCRIPTION = """Look into a saved adapter: a run's output, a checkpoint of any engine, or any LoRA adapter of PEFT.

For each kind of module and each depth, named by its layer's number:
  adds       directions that add something: all but those that `keep` closed while training
  rank       of the module's adapter
  eff. rank  exp of the entropy of the normalised singular values of the update BA
  norm       Frobenius norm of the update as it is added to the weight
  similarity mean cosine with the neighbouring depths of what the update reads from the residual stream, or writes to it, as
             a subspace: from 0 to 1, whatever the order and mixture of the directions
  semantic   layers joined to this one by semantic edges
  nats       the most that the module's directions pass about their input through the noise of their gates, together
  open       mean openness of its gates, from 0 to 1
  closed     directions of openness below 1/2
The last three are of structlora_gates.safetensors, which a run with gates leaves beside its adapter. What a plain adapter
does not tell, without structlora.safetensors beside it, shows as '-'. Where an adapter lies alone, the state is that of the
newest checkpoint near it that holds the same adapter. First come where the bytes of the file are, and what each server needs
to load it (`structlora export --for`).

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
        "--against", type=Path, metavar="FOLDER", help="another adapter, beside this one in the figures"
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
    if given.against and given.json and not is_drawn:
        parser.error("--against is for a table or figures; run `structlora inspect --json` on each adapter")
    for name in ("base", "split"):
        if getattr(given, name) and not given.data:
            parser.error(f"--{name} needs --data")
    for folder in filter(None, (given.adapter, given.against)):
        refuse_missing(folder)
    if given.html:
        refuse_unwritable_file(given.html)
    if given.plot:
        refuse_unwritable(given.plot)
    if given.data is not None:
        local_path(given.data)  # a file that is not there is told here
    if given.base is not None:
        given.base = refuse_missing_model(given.base, "--base")
    # After the arguments: these load torch and PEFT. Before the work: a missing library is told at once.
    from ..shrink.inspecting import contents, report
    from ..shrink.load_adapter import read_saved
    from ..shrink.servers import told
    from ..shrink.trial import information_curves

    if is_drawn:
        from ..shrink import figures
    if given.html:
        from ..shrink.page import write_page
    folders = [folder for folder in (given.adapter, given.against) if folder]
    # Both before the work: a wrong path is told at once.
    adapters = [read_saved(folder) for folder in folders]
    saved = adapters[0]
    kinds = report(saved)
    if given.json:
        facts = {"adapter": str(given.adapter), "step": saved.step}
        facts["options"] = saved.config.options() if saved.config else None
        facts["file"] = [asdict(part) for part in contents(saved.tensors)]
        facts["servers"] = told(saved.lora, saved.tensors)
        print(json.dumps({**facts, "kinds": [asdict(kind) for kind in kinds]}, indent=2))
    else:
        print(summary(saved, kinds))
        print("\n".join(about_file(saved)))
        others = []
        if given.against:
            others = report(adapters[1])
            print(f"\nBeside it: {summary(adapters[1], others)}")
        print(table(kinds, others))
    if not is_drawn:
        return
    runs = []
    for adapter, name in zip(adapters, _run_names(folders), strict=True):
        curves = information_curves(adapter, given.data, given.base, given.split) if given.data else []
        runs.append(figures.Run.of(name, adapter, curves))
    lines = []
    if given.plot:
        drawn = figures.charts(runs)
        with writing(given.plot) as folder:
            written = figures.write(folder, drawn)
        lines += [f"\nWrote {', '.join(written)} to {given.plot}."]
        lines += [f"No {reason}." for key, reason in _LACKING.items() if key not in written]
    if given.html:
        with writing(given.html.parent) as folder:
            write_page(folder / given.html.name, runs)
        lines += [f"\nWrote {given.html}."]
    if not given.json:
        print("\n".join(lines))


_LACKING = {
    "nats": "map of nats: no structlora_gates.safetensors beside the adapter",
    "similarity": "similarity map: it needs StructLoRA's state and two depths",
    "training": "curves of the training: no trainer_state.json beside the adapter",
}


def _run_names(folders: list[Path]) -> list[str]:
    """The folders' names, or their paths where these are the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len({*names}) == len(names) else [str(folder) for folder in folders]


def summary(saved: Saved, kinds: list[KindReport]) -> str:
    """What matters most, in a few lines: what the adapter is, its directions, the last losses of its log."""
    from ..shrink.inspecting import (
        final_losses,
        gates_in_words,
        held_out_rows,
        log_history,
        mean_effective_rank,
    )

    history = log_history(saved.run_folder)
    if saved.config:
        config = saved.config
        lines = [
            f"{saved.folder}: StructLoRA after {saved.step} steps, gates {config.gates}, coordinator {config.coordinator} "
            f"({config.edges})"
        ]
    else:
        lines = [f"{saved.folder}: a LoRA adapter without StructLoRA's state"]
    if saved.run_folder != saved.folder:
        what = "State and log" if saved.maps else "Log"
        lines.append(f"{what} of {saved.run_folder}, the newest checkpoint that holds the same adapter.")
    depths = [depth for kind in kinds for depth in kind.depths]
    directions = sum(depth.rank for depth in depths)
    line = f"{directions:,} directions in {len(depths):,} modules, mean effective rank "
    line += f"{mean_effective_rank(depths):.2f}"
    kept = sum(depth.kept for depth in depths)
    line += f"; {kept:,} of the directions add something" if kept < directions else ""
    training, held_out = final_losses(history)
    rows = held_out_rows(history)
    line += "" if training is None else f"; training loss {training:.4g}"
    line += (
        "" if held_out is None else f"; held-out loss {held_out:.4g}" + (f" of {rows:,} rows" if rows else "")
    )
    lines.append(f"{line}.")
    if gates := gates_in_words(depths):
        lines.append(f"{gates[0].upper()}{gates[1:]}.")
    return "\n".join(lines)


def about_file(saved: Saved) -> list[str]:
    """Where the bytes are, and what servers need, a line each."""
    from ..shrink.inspecting import contents
    from ..shrink.servers import told

    parts = contents(saved.tensors)
    lines = [
        "Bytes: "
        + "; ".join(f"{part.what} {in_words(part.bytes, 'B')} ({part.dtype})" for part in parts)
        + "."
    ]
    return [*lines, *(f"{name}: {line}." for name, line in told(saved.lora, saved.tensors).items())]


def table(kinds: list[KindReport], others: Sequence[KindReport] = ()) -> str:
    """Text for a terminal; with rank, effective rank and norm of another adapter's modules of the same names."""
    beside = {depth.module: depth for kind in others for depth in kind.depths}
    lines, is_gated = [], any(depth.nats is not None for kind in kinds for depth in kind.depths)
    for kind in kinds:
        depth_count, _, k, d = kind.shape
        role = {"read": "reads", "write": "writes"}.get(kind.role)
        about = f"{role} the residual stream" if role else "unknown role"
        ranks = {depth.rank for depth in kind.depths}
        rank = "to ".join(f"{value} " for value in sorted({min(ranks), max(ranks)})).strip()
        depths = f"{depth_count} {'depth' if depth_count == 1 else 'depths'}"
        lines += [f"\n{kind.name}  ({depths}, r {rank}, {k} -> {d}, {about})"]
        figures = f"{'eff. rank':>9}  {'norm':>9}  {'similarity':>10}"
        more = f"  | {'rank':>4}  {'eff. rank':>9}  {'norm':>9}" if others else ""
        gates = f"{'nats':>7}  {'open':>4}  {'closed':>6}  " if is_gated else ""
        lines += [f"{'layer':>5}  {'adds':>4}  {'rank':>4}  {figures}  {gates}semantic{more}"]
        for row in kind.depths:
            similarity = "-" if row.similarity is None else f"{row.similarity:.3f}"
            semantic = (
                "-"
                if row.semantic is None
                else " ".join(kind.depths[other].layer for other in row.semantic) or "none"
            )
            figures = f"{row.effective_rank:>9.2f}  {row.norm:>9.3g}  {similarity:>10}"
            if is_gated:
                gates = f"{'-':>7}  {'-':>4}  {'-':>6}  "
            if row.nats is not None:
                gates = f"{row.nats:>7.2f}  {row.openness:>4.2f}  {row.closed:>6}  "
            other = beside.get(row.module)
            more = "  | left out" if others else ""
            if other:
                more = f"  | {other.rank:>4}  {other.effective_rank:>9.2f}  {other.norm:>9.3g}"
            lines.append(
                f"{row.layer:>5}  {row.kept:>4}  {row.rank:>4}  {figures}  {gates}{semantic:<8}{more}".rstrip()
            )
    return "\n".join(lines)
