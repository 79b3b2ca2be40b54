"""`structlora export`: from a checkpoint to a plain LoRA adapter, made smaller or merged if asked."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import ENOUGH_INFORMATION
from ..errors import StructLoRAError, nearest, refuse_used
from ..local_data import local_path
from ..shrink.export_options import Options
from .arguments import parser_of
from .early import ADAPTER_CONFIG, refuse_missing_model

if TYPE_CHECKING:
    from ..shrink.export import Export, Size

_DESCRIPTION = """Write the plain LoRA adapter of a run's output, of a checkpoint (of one process, DDP, FSDP2 or DeepSpeed
ZeRO), or of any LoRA adapter of PEFT: as it is, smaller, for a server, or merged. The result needs nothing of this package.

Directions that matter: those of the largest singular values, in which after a run with gates each direction of training
counts by its openness (structlora_gates.safetensors beside the adapter). With --data, or without gates the rows that the run held
out, --keep takes those with most information about the labels.
"""
_EXAMPLES = """examples:
  structlora export out/checkpoint-500 adapter
  structlora export out small --keep 0.25
  structlora export lora small --rank 4 --data rows.jsonl --distil
  structlora export lora sizes --rank 8 4 2 --data trl-lib/Capybara --split test
  structlora export lora small --keep 99% --data rows.jsonl
  structlora export out served --for llamacpp --dtype bfloat16
  structlora export out merged --merge
"""


def run(command: str, arguments: list[str]) -> None:
    """Write the adapter or the merged model, and print what was done.

    Raises:
        StructLoRAError: no adapter to read, one that cannot be made smaller, a base model that cannot be
            loaded, or an output folder that is not empty.
        SystemExit: `--help`, or an unknown argument.
    """
    parser = parser_of(command, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint or adapter")
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    for option in fields(Options):
        flag = option.metadata["flag"] or f"--{option.name.replace('_', '-')}"
        text = option.metadata["help"].replace("%", "%%")
        parser.add_argument(
            flag, dest=option.name, default=option.default, help=text, **option.metadata["argument"]
        )
    given = vars(parser.parse_args(arguments))
    folder, out = given.pop("checkpoint"), given.pop("out")
    options = Options(**given)
    refuse_missing(folder)
    refuse_used(out)
    if options.has_data:
        local_path(options.data)  # a file that is not there is told here
    if options.base is not None:
        options.base = refuse_missing_model(options.base, "--base")
    # After the arguments, and after a path that is wrong: these load torch and PEFT.
    from ..shrink.export import export_sizes
    from ..shrink.load_adapter import read_saved

    done = export_sizes(read_saved(folder), out, options)
    if done[0].pruned:
        print(table(done))
    for size in done:
        for note in _notes(size, options):
            print(f"{size.folder.name}: {note}.")
    what = "the merged model" if options.merge else "a plain LoRA adapter"
    print(f"Wrote {what} to {', '.join(str(size.folder) for size in done)}.")


def refuse_missing(folder: Path) -> None:
    """Stop at a path that is no folder, or one without an adapter, before torch is imported.

    Raises:
        StructLoRAError: it names what is there.
    """
    if not folder.is_dir() or not any(next(folder.glob(f"{p}{ADAPTER_CONFIG}"), None) for p in ("", "*/")):
        found = f"a file {folder}" if folder.exists() else f"no folder {folder}{nearest(str(folder))}"
        found = f"no {ADAPTER_CONFIG} in {folder}" if folder.is_dir() else found
        raise StructLoRAError(
            found,
            "a folder with a saved LoRA adapter: a run's output, or one of its checkpoints",
            "correct the path",
        )


def table(done: list[Export]) -> str:
    """What smaller adapters save and cost, beside the base model and the whole adapter, for a terminal."""
    rows = [["", "rank", "directions", "parameters", "size", "loss", "gain kept"]]

    def add(
        name: str, of: Export, loss: float | None, ranks: list[int] | None = None, size: Size | None = None
    ):
        low, high = (min(ranks), max(ranks)) if ranks else ("", "")
        counts = (
            [f"{size.directions:,}", in_words(size.parameters), in_words(size.bytes, "B")]
            if size
            else [""] * 3
        )
        kept = None if loss is None else of.losses._replace(after=loss).gain_kept
        number = "-" if loss is None else f"{loss:.4g}"
        gain = "-" if kept is None else f"{100 * kept:.0f} %"
        rows.append([name, f"{low}" if low == high else f"{low} to {high}", *counts, number, gain])

    first = done[0]
    if first.losses:
        add("base model", first, first.losses.base)
    ranks = [mask.shape[1] for mask in first.pruned.kept.values()]
    add("the adapter", first, first.losses and first.losses.before, ranks, first.before)
    for size in done:
        name, losses = size.folder.name, size.losses
        if losses and losses.cut is not None:
            add(f"{name}, cut alone", size, losses.cut)
        name += ", distilled" if size.distilled else ""
        name += f", times {size.scaled.scale:g}" if size.scaled else ""
        ranks = [int(mask.sum(1).max()) for mask in size.pruned.kept.values()]
        ranks = [max(ranks)] if size.pruned.one_rank else ranks
        add(name, size, losses and losses.after, ranks, size.after)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row[1:], widths[1:])) for row in rows]
    return "\n".join(f"{row[0]:<{widths[0]}}  {line}" for row, line in zip(rows, lines, strict=True))


def _notes(size: Export, options: Options) -> list[str]:
    """What else there is to say of a size."""
    pruned, notes = size.pruned, []
    if options.prune and not pruned:
        notes.append("every direction adds something, so nothing was dropped")
    if pruned and pruned.share is not None:
        notes.append(f"what is kept carries {pruned.share:.1%} of {pruned.measure}")
        if pruned.share < ENOUGH_INFORMATION and "%" in str(options.keep):
            notes.append(
                "below 90 % much of what was learned is lost; a share of the directions is written 0.25"
            )
    if pruned and pruned.empty:
        notes.append(f"{len(pruned.empty)} modules keep no direction")
    if taught := size.distilled:
        on = f"{taught.held_out} held-out rows" if taught.held_out else "the rows learned from"
        steps = f"best after {taught.steps} steps"
        notes.append(f"distance of the outputs on {on} {taught.start:.3g} -> {taught.end:.3g}, {steps}")
    if times := size.scaled:
        notes.append(f"the update is multiplied by {times.scale:g}")
        if times.before is not None:
            notes.append(
                f"loss of {times.rows}, each at the scale of the others: {times.before:.4g} -> {times.after:.4g}"
            )
    if size.rows and size.losses:
        lower = "" if size.rows.held_out else "; rows of the training have a lower loss than new ones"
        notes.append(f"{size.rows.told()}; the loss is of {size.losses.rows}{lower}")
    return notes


def in_words(count: int, unit: str = "") -> str:
    """A count in words: 1.2 million, 4.9 MB."""
    steps = ((1e9, "billion", "G"), (1e6, "million", "M"), (1e3, "thousand", "k"))
    for size, word, letter in steps:
        if count >= 0.9995 * size:  # what rounds to 1,000 of the next smaller one
            return f"{count / size:.3g} {letter + unit if unit else word}"
    return f"{count} {unit}".strip()
