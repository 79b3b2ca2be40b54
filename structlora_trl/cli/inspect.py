"""`structlora inspect`: what an adapter has learned, by kind of module and depth."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ..adapters.inspecting import KindReport, log_history, report
from ..adapters.load_adapter import Saved, read_saved
from ..adapters.page import Run, write_page
from .parser import parser_of

_DESCRIPTION = """Look into a saved adapter: a run's output, a checkpoint of any engine, or any LoRA adapter of PEFT.

For each kind of module and each depth, named by its layer's number:
  open       directions whose gate is open with probability above one half, of all
  openness   mean probability that a direction is open
  groups     the same of the attention heads, or of the expert, where `head_gates` or `expert_gates` gave them gates
  eff. rank  exp of the entropy of the normalised singular values of the update BA
  norm       Frobenius norm of the update as it is added to the weight
  coherence  mean cosine with the neighbouring depths' updates, on the side that is comparable across depth
  stream     the same for what the update reads from the residual stream, or writes to it, as a subspace: from 0 to 1, and
             whatever the order and mixture of the directions
  semantic   layers joined to this one by semantic edges
What a plain adapter does not tell, without structlora.safetensors beside it, shows as '-'.
"""
_EXAMPLES = """examples:
  structlora inspect out
  structlora inspect out/checkpoint-500 --plot figures     # needs matplotlib: pip install "structlora-trl[plot]"
  structlora inspect out --html report.html --against lora  # a page to look at, with two runs side by side
  structlora inspect out --json | jq '.kinds[0].depths[0]'
"""


def run(command: str, arguments: list[str]) -> None:
    """Print a table, or JSON; with `--plot`, write figures.

    Raises:
        StructLoRAError: nothing there to read; or figures are asked for and matplotlib is missing.
    """
    parser = parser_of(command, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("adapter", type=Path, help="folder of the adapter or checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write figures (PNG and PDF) to this folder")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page: one HTML file, with all figures in it")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another adapter, beside this one on the page")
    given = parser.parse_args(arguments)
    if given.against and not given.html:
        parser.error("--against needs --html")
    if given.plot:
        from ..adapters import plots  # before the work, so that a missing matplotlib is told at once
    saved = read_saved(given.adapter)
    kinds = report(saved)
    if given.json:
        facts = {"adapter": str(given.adapter), "step": saved.step}
        facts["options"] = saved.maps[0].config.options() if saved.maps else None
        print(json.dumps({**facts, "kinds": [asdict(kind) for kind in kinds]}, indent=2))
    else:
        print(table(saved, kinds))
    if given.plot:
        written, lacking = plots.write(given.plot, kinds, log_history(saved.folder))
        if not given.json:
            print(f"\nWrote {', '.join(written)} to {given.plot}.")
            for reason in lacking:
                print(f"No {reason}.")
    if given.html:
        folders = [given.adapter, *([given.against] if given.against else [])]
        found = [saved, *map(read_saved, folders[1:])]
        write_page(given.html, [Run.of(*pair) for pair in zip(_run_names(folders), found, strict=True)])
        if not given.json:
            print(f"\nWrote {given.html}.")


def _run_names(folders: list[Path]) -> list[str]:
    """The folders' names, or their paths where these are the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len({*names}) == len(names) else [str(folder) for folder in folders]


def table(saved: Saved, kinds: list[KindReport]) -> str:
    """Text for a terminal."""
    if saved.maps:
        config = saved.maps[0].config
        lines = [
            f"{saved.folder}: StructLoRA after {saved.step} steps, filter {config.filter}, coordinator {config.coordinator} "
            f"({config.edges})"
        ]
    else:
        lines = [f"{saved.folder}: a LoRA adapter without StructLoRA's state"]
    for kind in kinds:
        depth_count, rank, k, d = kind.shape
        role = {"read": "reads", "write": "writes"}.get(kind.role)
        about = f"{role} the residual stream" if role else "unknown role"
        lines += [f"\n{kind.name}  ({depth_count} depths, r {rank}, {k} -> {d}, {about})"]
        groups = "groups  " if kind.depths[0].groups is not None else ""
        figures = f"{'eff. rank':>9}  {'norm':>9}  {'coherence':>9}  {'stream':>6}"
        lines += [f"{'layer':>5}  {'open':>7}  {'openness':>8}  {groups}{figures}  semantic"]
        for row in kind.depths:
            open_ = "-" if row.gates is None else f"{sum(gate > 0.5 for gate in row.gates)}/{row.rank}"
            openness_ = "-" if row.gates is None else f"{sum(row.gates) / row.rank:.3f}"
            groups = f"{sum(row.groups) / len(row.groups):>6.3f}  " if row.groups is not None else ""
            coherence, stream = ("-" if cosine is None else f"{cosine:.3f}" for cosine in (row.coherence, row.stream))
            semantic = (
                "-" if row.semantic is None else " ".join(kind.depths[other].layer for other in row.semantic) or "none"
            )
            figures = f"{row.effective_rank:>9.2f}  {row.norm:>9.3g}  {coherence:>9}  {stream:>6}"
            lines.append(f"{row.layer:>5}  {open_:>7}  {openness_:>8}  {groups}{figures}  {semantic}")
    return "\n".join(lines)
