"""`structlora export`: from a checkpoint to a plain LoRA adapter, pruned or merged if asked."""

from __future__ import annotations

from pathlib import Path

from ..adapters.export import Export, export
from ..adapters.measuring import RANDOM
from ..adapters.load_adapter import read_saved
from .parser import parser_of

_DESCRIPTION = """Write the plain LoRA adapter of a run's output or of a checkpoint: of one process, DDP, FSDP2 or DeepSpeed ZeRO,
and of what DeepSpeed's zero_to_fp32.py made inside a checkpoint (its fp32 masters are latent factors: the map is applied).
The result loads in PEFT, and needs nothing of this package.

--prune T drops each direction whose gate is open with probability below T: row j of lora_A and column j of lora_B. Ranks then
differ by module; `rank_pattern` and `alpha_pattern` of the result say so to PEFT. All modules have one scale, `lora_alpha / r`,
which is what vLLM and SGLang read (differences between scales are in lora_B). What it costs is measured: the base model with
the adapter before and after, on a probe batch of random tokens or pictures, or of a text with --probe.

--one-rank fills modules of a smaller rank with zeros, and writes no patterns and no rank stabilisation. Use it for llama.cpp
(convert_lora_to_gguf.py), which divides one alpha by each module's own rank.

--merge writes the base model with the adapter merged into it, in the base model's own precision.
"""
_EXAMPLES = """examples:
  structlora export out/checkpoint-500 adapter
  structlora export out small --prune 0.05 --probe sample.txt
  structlora export out merged --merge
"""


def run(command: str, arguments: list[str]) -> None:
    """Write the adapter or the merged model, and print what was done.

    Raises:
        StructLoRAError: no adapter to read, one that cannot be pruned, a base model that cannot be loaded, or an output folder
            that is not empty.
        SystemExit: `--help`, an unknown argument, or one that has no effect beside the others.
    """
    parser = parser_of(command, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint or adapter")
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    parser.add_argument("--prune", type=float, metavar="T", help="drop directions with an openness below T")
    parser.add_argument("--one-rank", action="store_true", help="fill all modules up to one rank with zeros")
    parser.add_argument("--merge", action="store_true", help="write the merged model instead of the adapter")
    parser.add_argument("--base", metavar="MODEL", help="base model; default: the one named in adapter_config.json")
    parser.add_argument("--probe", metavar="FILE", help="text to measure pruning on, or 'none' to skip it")
    given = parser.parse_args(arguments)
    if given.probe is not None and given.prune is None:
        parser.error("--probe needs --prune, whose cost it measures")
    if given.one_rank and given.merge:
        parser.error("--one-rank is of the adapter, and --merge writes none; give one of them")
    done = export(
        read_saved(given.checkpoint),
        given.out,
        prune_below=given.prune,
        one_rank=given.one_rank,
        merge=given.merge,
        base=given.base,
        probe=RANDOM if given.probe is None else given.probe,
    )
    if done.sizes:
        print(table(done))
    print(f"Wrote {'the merged model' if given.merge else 'a plain LoRA adapter'} to {given.out}.")


def table(done: Export) -> str:
    """What pruning saved and what it changed, for a terminal."""
    width = max(len(size.what) for size in done.sizes)
    lines = [f"{'':{width}}  {'before':>12}  {'after':>12}  {'kept':>7}"]
    lines += [f"{what:{width}}  {old:>12,}  {new:>12,}  {new / old:>7.1%}" for what, old, new in done.sizes]
    if done.pruned and done.pruned.spared:
        lines.append(
            f"{len(done.pruned.spared)} modules are wholly closed; each keeps its most open direction (PEFT knows no rank 0)."
        )
    if done.change:
        lines.append(
            f"Output change on {done.change.probe}: largest |Δlogit| {done.change.largest:.3g}, "
            f"mean KL {done.change.divergence:.3g} nats, same prediction {done.change.agreement:.1%}"
        )
    return "\n".join(lines)
