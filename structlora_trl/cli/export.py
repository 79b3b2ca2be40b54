"""`structlora export`: from a checkpoint to a plain LoRA adapter, made smaller or merged if asked."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from .arguments import parser_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..adapters.export import Export
    from ..adapters.load_adapter import Saved

_DESCRIPTION = """Write the plain LoRA adapter of a run's output or of a checkpoint: of one process, DDP,
FSDP2 or DeepSpeed ZeRO. Of a folder that DeepSpeed's zero_to_fp32.py made inside a checkpoint, the checkpoint
is read: the fp32 masters are latent factors. The result loads in PEFT, and needs nothing of this package.

--keep SHARE makes any LoRA adapter smaller, of StructLoRA or not: it keeps 0.25 of all directions, or with
--keep 99% the fewest that carry 99 % of the information, chosen over the whole model among the singular
directions of each module's update. With --data, a direction is worth what the rows tell about a gate on it,
E[(m dL/dm)^2]: give some tens of rows that were not trained on, with the columns that `structlora sft` reads
(messages, prompt and completion, or text). Without --data the largest singular values stay, usually the worse
choice, for they do not know the task. Modules that keep no direction are left out.

--prune T drops each direction whose gate is open with probability below T: row j of lora_A and column j of
lora_B. It is for runs whose gates did close (a lower `prior`, a higher `kl_weight`).

Ranks then differ by module; `rank_pattern` and `alpha_pattern` of the result say so to PEFT. All modules have
one scale, `lora_alpha / r`, which is what vLLM and SGLang read (differences between scales are in lora_B).
What it costs is measured: the base model with the adapter before and after, on the rows of --data, or on
random tokens or pictures, or on a text with --probe.

--one-rank fills modules of a smaller rank with zeros, and writes no patterns and no rank stabilisation. Use
it for llama.cpp (convert_lora_to_gguf.py), which divides one alpha by each module's own rank.

--merge writes the base model with the adapter merged into it, in the base model's own precision.
"""
_EXAMPLES = """examples:
  structlora export out/checkpoint-500 adapter
  structlora export out small --keep 0.25 --data rows.jsonl
  structlora export lora small --keep 99% --data rows.jsonl --one-rank
  structlora export out small --prune 0.05 --probe sample.txt
  structlora export out merged --merge
"""


def run(command: str, arguments: list[str]) -> None:
    """Write the adapter or the merged model, and print what was done.

    Raises:
        StructLoRAError: no adapter to read, one that cannot be made smaller, a base model that cannot be
            loaded, or an output folder that is not empty.
        SystemExit: `--help`, an unknown argument, or one that has no effect beside the others.
    """
    parser = parser_of(command, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint or adapter")
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    rule = parser.add_mutually_exclusive_group()
    rule.add_argument(
        "--keep", metavar="SHARE", help="keep this share of all directions, or N%% of the information"
    )
    rule.add_argument("--prune", type=float, metavar="T", help="drop directions with an openness below T")
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="rows that tell what to keep (.jsonl, .csv, .parquet)"
    )
    parser.add_argument("--one-rank", action="store_true", help="fill all modules up to one rank with zeros")
    parser.add_argument("--merge", action="store_true", help="write the merged model instead of the adapter")
    parser.add_argument(
        "--base", metavar="MODEL", help="base model; default: the one named in adapter_config.json"
    )
    parser.add_argument("--probe", metavar="FILE", help="text to measure the change on, or 'none' to skip it")
    given = parser.parse_args(arguments)
    if given.data is not None and given.keep is None:
        parser.error("--data needs --keep, which it tells what to keep")
    if given.probe is not None and (given.data is not None or (given.prune is None and given.keep is None)):
        parser.error(
            "--probe needs --keep or --prune, whose cost it measures; with --data the rows are measured on"
        )
    if given.one_rank and given.merge:
        parser.error("--one-rank is of the adapter, and --merge writes none; give one of them")
    # After the arguments: these load torch and PEFT.
    from ..adapters.export import export
    from ..adapters.load_adapter import read_saved
    from ..adapters.measuring import RANDOM
    from ..adapters.pruning import openness

    saved = read_saved(given.checkpoint)
    done = export(
        saved,
        given.out,
        prune_below=given.prune,
        keep=given.keep,
        data=given.data,
        one_rank=given.one_rank,
        merge=given.merge,
        base=given.base,
        probe=RANDOM if given.probe is None else given.probe,
    )
    if saved.maps and saved.run_folder != saved.folder:
        print(f"Gates: of {saved.run_folder}, the newest checkpoint that holds the same adapter.")
    if done.pruned:
        print(table(saved, done))
        if given.prune is not None and done.sizes[0].before == done.sizes[0].after:
            print(all_open(openness(saved), given.prune))
        if given.keep is not None:
            told = "the information in the rows of --data" if given.data else "the squared singular values"
            print(f"The directions kept carry {done.pruned.share:.1%} of {told}.")
            if not given.data:
                print(
                    "Singular values do not know the task, and are usually the worse choice: give examples with --data ROWS."
                )
    print(f"Wrote {'the merged model' if given.merge else 'a plain LoRA adapter'} to {given.out}.")


def table(saved: Saved, done: Export) -> str:
    """What a smaller adapter saves, by kind and layer, and what it changes, for a terminal."""
    width = max(len(size.what) for size in done.sizes)
    lines = [f"{'':{width}}  {'before':>12}  {'after':>12}  {'kept':>7}  by layer"]
    by_layer = {
        f"directions of {kind.name}": [sum(map(len, done.pruned.kept[module])) for module in kind.modules]
        for kind in saved.kinds
    }
    for what, old, new in done.sizes:
        counts = "".join(f" {count}" for count in by_layer.get(what, ()))
        lines.append(f"{what:{width}}  {old:>12,}  {new:>12,}  {new / old:>7.1%} {counts}".rstrip())
    if done.pruned.spared:
        count = len(done.pruned.spared)
        lines.append(
            f"{count} modules would keep no direction; each keeps its best one, for PEFT knows no rank 0 there."
        )
    if done.pruned.left_out:
        lines.append(
            f"{len(done.pruned.left_out)} modules keep no direction and are left out (`exclude_modules`)."
        )
    if done.change:
        lines.append(
            f"Output change on {done.change.probe}: largest |Δlogit| {done.change.largest:.3g}, "
            f"mean KL {done.change.divergence:.3g} nats, same prediction {done.change.agreement:.1%}"
        )
        if done.change.losses:
            before, after = done.change.losses
            lines.append(
                f"Loss on {done.change.probe}: {before:.4g} before, {after:.4g} after ({after - before:+.3g})."
            )
    return "\n".join(lines)


def all_open(gates: dict[str, Tensor], threshold: float) -> str:
    """That no gate is below a threshold; `gates` as `openness` gives them."""
    values = sorted(gate for part in gates.values() for gate in part.flatten().tolist())
    return (
        f"No gate is below {threshold:g}, so nothing was dropped: the least open one is at {values[0]:.3f}, the median at "
        f"{median(values):.3f}. To choose by what a task needs: `--keep 0.25 --data ROWS`."
    )
