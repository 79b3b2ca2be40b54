"""`structlora export`: from a checkpoint to a plain LoRA adapter, made smaller or merged if asked."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import ENOUGH_INFORMATION, share_to_keep
from ..errors import StructLoRAError, nearest, refuse_used
from ..local_data import local_path
from ..shrink.export_options import RANDOM, Options, Sizes, sizes_of
from .arguments import parser_of
from .early import ADAPTER_CONFIG, refuse_missing_model

if TYPE_CHECKING:
    from ..shrink.export import Export
    from ..shrink.load_adapter import Saved
    from ..shrink.measuring import Losses
    from ..shrink.pruning import Pruned

_DESCRIPTION = """Write the plain LoRA adapter of a run's output, of a checkpoint (of one process, DDP, FSDP2 or DeepSpeed
ZeRO), or of any LoRA adapter of PEFT: smaller, for a server, or merged. The result needs nothing of this package.

Smaller:
  --rank R       one rank for all modules, which is what LoRA servers pay for.
  --keep SHARE   the share of all directions (0.25) that matters most over the whole model, or the fewest that carry a share
                 of what matters (99%). Ranks then differ by module (`rank_pattern`), and modules that keep nothing are
                 left out: the smallest file for a given loss, and no smaller in a server's memory; --max-rank limits it.
  --prune        drops directions that add nothing: those that `keep` closed while training.
  --distil       then 100 steps (--distil 300: more) in which the smaller adapter learns the outputs of the whole one on these
                 rows. No labels are needed. One row in eight is held out, and the best weights on these are kept.

What matters: after a run with gates their openness, which training has learned and left beside the adapter
(structlora_gates.safetensors). With --data, or rows that the run held out, the information of the rows for --keep. Else, and
for --rank with --data, the singular values of each module's update.

--scale auto   then the update times that number of 1, 0.85, 0.7, 0.5 and 0.3 at which the loss is lowest, with or without a
               cut: an adapter that is too sure of itself gets a lower loss. Rows have to be held out of the training: on its
               own training rows an adapter needs no smaller update. --scale 0.7 takes that number. It goes into lora_B.
               Weights that the adapter holds whole (`modules_to_save`, `bias`) stay as they are.

Several sizes in one call (--rank 8 4 2) are written to folders of their own, with a table.

Rows (--data): a file (.jsonl, .json, .csv, .tsv, .parquet, packed or not), a folder of them, or a data set of the hub, with
`messages`, `prompt` and `completion`, `text`, `chosen` and `rejected`; for classifiers `text` and `label`. 64 tell --keep what
to keep, --distil learns from up to 1,024, and the loss is of 64 others. Without --data the run's own held-out rows are taken,
where its log names them.

--for SERVER writes what that server loads, or says what it cannot: vllm; sglang, lorax (TGI too) and llamacpp
need one rank and one scale, so that smaller modules are filled with zeros.

All modules of a smaller adapter have one scale, `lora_alpha / r`. What it costs is measured on the rows, or on random tokens or
pictures, or on a text with --probe; --probe none needs no base model.
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
    rule = parser.add_mutually_exclusive_group()
    rule.add_argument("--rank", type=int, nargs="+", metavar="R", help="one rank for all modules")
    rule.add_argument(
        "--keep", nargs="+", metavar="SHARE", help="this share of all directions, or N%% of what matters"
    )
    rule.add_argument("--prune", action="store_true", help="drop directions that add nothing")
    parser.add_argument("--max-rank", type=int, metavar="R", help="with --keep: most directions of a module")
    parser.add_argument(
        "--distil",
        type=int,
        nargs="?",
        const=100,
        default=0,
        metavar="STEPS",
        help="let the smaller adapter learn from the whole one, for 100 steps or as many as are given",
    )
    parser.add_argument(
        "--scale",
        type=_scale,
        metavar="NUMBER",
        help="the update times this number, or 'auto': as held-out rows ask",
    )
    parser.add_argument("--data", metavar="ROWS", help="a file, a folder or a data set of the hub")
    parser.add_argument("--split", metavar="NAME", help="split of --data; default: test, validation or train")
    parser.add_argument(
        "--for", dest="server", metavar="SERVER", help="vllm, sglang, lorax or llamacpp: write what it loads"
    )
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: as it is")
    parser.add_argument("--merge", action="store_true", help="write the merged model instead of the adapter")
    parser.add_argument(
        "--base", metavar="MODEL", help="base model; default: the one named in adapter_config.json"
    )
    parser.add_argument(
        "--probe", metavar="FILE", default=RANDOM, help="text to measure the change on, or 'none' to skip it"
    )
    given = parser.parse_args(arguments)
    ranks, shares = given.rank or [], given.keep or []
    sizes = sizes_of(ranks, shares, given.prune, named=len(ranks + shares) > 1)
    options = Options(**{option.name: getattr(given, option.name) for option in fields(Options)})
    options.refuse_contradictions(sizes)
    refuse_missing(given.checkpoint)
    refuse_used(given.out)
    if given.data is not None:
        local_path(given.data)  # a file that is not there is told here
    if given.base is not None:
        given.base = refuse_missing_model(given.base, "--base")
    # After the arguments, and after a path that is wrong: these load torch and PEFT.
    from ..shrink.export import write
    from ..shrink.load_adapter import read_saved

    saved, is_cut = read_saved(given.checkpoint), bool(ranks or shares)
    done = write(saved, given.out, sizes, options)
    if saved.maps and saved.run_folder != saved.folder:
        print(f"State: of {saved.run_folder}, the newest checkpoint that holds the same adapter.")
    if done[0].pruned:
        print(table(saved, done))
    for size in done:
        if size.scaled:
            print(f"{size.folder.name}: {_about_scale(*size.scaled)}")
    if given.prune and not done[0].pruned:
        print(
            "Every direction adds something, so nothing was dropped. To choose by a task: `--keep 0.25 --data ROWS`."
        )
    if lost := _costly(done, sizes):
        print(
            f"{' and '.join(lost)} kept: a percentage is a share of what matters, and not of the size, and "
            "below 90 % an adapter loses much of what it learned. A share of the directions is written 0.25."
        )
    if is_cut and saved.openness and given.data is None:
        print(_about_gates(saved, done[0].pruned))
    elif shares and done[0].rows is None:
        print(
            "Without rows each module keeps one share of its update's squared norm, which does not know the task. Where little is "
            "kept, rows lose less: give examples with --data ROWS."
        )
    what = "the merged model" if given.merge else "a plain LoRA adapter"
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


def _costly(done: list[Export], sizes: Sizes) -> list[str]:
    """What is kept of the information, or without rows of the squared norm, where a share of it was asked for and less than 90 %
    is carried."""
    asked = {name for name, (rule, value) in sizes.items() if rule == "keep" and share_to_keep(value)[1]}
    cuts = [size.pruned for size, name in zip(done, sizes, strict=False) if name in asked]
    return [f"{cut.share:.1%} of {cut.measure}" for cut in cuts if cut.share < ENOUGH_INFORMATION]


def table(saved: Saved, done: list[Export]) -> str:
    """What smaller adapters save and cost, beside the base model and the whole adapter, for a terminal."""
    first = done[0]
    losses = first.change.losses if first.change else None
    heads = ["", "rank", "directions", "parameters", "size", *(["loss", "gain kept"] if losses else [])]
    whole = _ranks([depth for kind in saved.kinds for depth in _kind_ranks(saved, kind)])
    before = [size.before for size in first.sizes]
    rows = [["the adapter", whole, *_counts(before)]]
    if losses:
        rows[0] += [_number(losses.before), _gain(losses, losses.before)]
    if losses and losses.base is not None:
        rows.insert(0, ["base model", *[""] * 4, _number(losses.base), _gain(losses, losses.base)])
    for size in done:
        ranks = [max(map(len, experts)) for experts in size.pruned.kept.values()]
        name = size.folder.name
        if losses and size.change.losses.cut is not None:
            cut = size.change.losses.cut
            rows.append([f"{name}, cut alone", *[""] * 4, _number(cut), _gain(losses, cut)])
        name += ", distilled" if size.distilled else ""
        name += f", times {size.scaled.scale:g}" if size.scaled else ""
        row = [name, _ranks(ranks, size.pruned.one_rank), *_counts([line.after for line in size.sizes])]
        if losses:
            after = size.change.losses.after
            row += [_number(after), _gain(losses, after)]
        rows.append(row)
    lines = _aligned([heads, *rows])
    if losses and losses.base is not None and losses.base <= losses.before:
        lines.append("The adapter is no better than its base model on these rows: there is no gain to keep.")
    for size in done:
        lines += _about(size, len(done) > 1)
    for size in done:
        lines += _by_layer(saved, size, f"{size.folder.name}: " if len(done) > 1 else "")
    return "\n".join(lines)


def _about(size: Export, is_named: bool) -> list[str]:
    """What else there is to say of a size."""
    pruned, lines = size.pruned, []
    if pruned.share is not None:
        lines.append(f"What is kept carries {pruned.share:.1%} of {pruned.measure}.")
    if pruned.spared:
        lines.append(
            f"{len(pruned.spared)} modules would keep no direction; each keeps its best one, for PEFT knows no rank 0 there."
        )
    if pruned.empty:
        how = "are in the file as zeros" if pruned.one_rank else "are left out (`exclude_modules`)"
        lines.append(f"{len(pruned.empty)} modules keep no direction and {how}.")
    if size.distilled:
        taught = size.distilled
        on = f"{taught.held_out} held-out rows" if taught.held_out else "the rows learned from"
        lines.append(
            f"Distilled in {taught.seconds:.0f} s: distance of the outputs on {on} {taught.start:.3g} -> {taught.end:.3g}, "
            f"best after {taught.steps} of {taught.of} steps."
        )
    if size.change:
        change = size.change
        line = f"Output change on {change.probe}: largest {change.largest:.3g}"
        if change.divergence == change.divergence:  # not NaN, as of hidden states
            line += f", mean KL {change.divergence:.3g} nats, same prediction {change.agreement:.1%}"
        lines.append(f"{line}.")
        if size.rows:
            lower = "" if size.rows.held_out else " Rows of the training have a lower loss than new ones."
            lines.append(f"Rows: {size.rows.told()}; the loss is of {change.probe}.{lower}")
    return [f"{size.folder.name}: {line}" for line in lines] if is_named else lines


def _about_gates(saved: Saved, pruned: Pruned) -> str:
    lacking = len(pruned.kept.keys() - saved.openness.keys())
    others = (
        f" {lacking} modules have no gates: they keep all directions, or their largest singular values up to the rank that "
        "was asked for."
    )
    return f"Chosen by the openness of the gates, which training has learned.{others if lacking else ''}"


def _about_scale(scale: float, probe: str, before: float | None, after: float | None) -> str:
    if before is None:
        return f"the update is multiplied by {scale:g}."
    if scale == 1:
        return (
            f"the update stays as it is. A smaller one does not lower the loss of {probe} ({_number(before)}), as is usual on "
            "rows of the training."
        )
    loss = f"{_number(before)} -> {_number(after)}"
    return f"the update is multiplied by {scale:g}: loss of {probe} {loss}, each at the number that all others choose."


def _scale(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _by_layer(saved: Saved, done: Export, name: str) -> list[str]:
    """Directions of each kind of module, by layer, where ranks differ; `name` comes before them."""
    if done.pruned.one_rank:
        return []
    rows = [["", "before", "after", "kept", "by layer"]]
    for kind in saved.kinds:
        before = sum(rank * kind.adapted.experts for rank in _kind_ranks(saved, kind))
        after = [sum(map(len, done.pruned.kept[module])) for module in kind.modules]
        share = f"{sum(after) / before:.1%}"
        by_layer = " ".join(map(str, after))
        rows.append([f"{name}directions of {kind.name}", f"{before:,}", f"{sum(after):,}", share, by_layer])
    return _aligned(rows, left=(0, 4))


def _aligned(rows: list[list[str]], left: tuple[int, ...] = (0,)) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            f"{cell:<{width}}" if i in left else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _kind_ranks(saved: Saved, kind) -> list[int]:
    from ..shrink.peft_scaling import rank_of

    return [rank_of(saved.lora, module) for module in kind.modules]


def _ranks(ranks: list[int], one_rank: bool = False) -> str:
    low, high = min(ranks), max(ranks)
    return str(high) if one_rank or low == high else f"{low} to {high}"


def _counts(counts: list[int]) -> list[str]:
    directions, parameters, size = counts
    return [f"{directions:,}", in_words(parameters), f"{in_words(size, 'B')}"]


def in_words(count: int, unit: str = "") -> str:
    """A count in words: 1.2 million, 4.9 MB."""
    steps = ((1e9, "billion", "G"), (1e6, "million", "M"), (1e3, "thousand", "k"))
    for size, word, letter in steps:
        if count >= 0.9995 * size:  # what rounds to 1,000 of the next smaller one
            return f"{count / size:.3g} {letter + unit if unit else word}"
    return f"{count} {unit}".strip()


def _number(value: float) -> str:
    return f"{value:.4g}"


def _gain(losses: Losses, loss: float) -> str:
    """What an adapter of this loss keeps of the gain over the base model."""
    kept = losses._replace(after=loss).gain_kept
    return "-" if kept is None else f"{kept:.0%}".replace("%", " %")
