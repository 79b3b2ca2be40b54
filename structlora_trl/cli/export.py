"""`structlora export`: from a checkpoint to a plain LoRA adapter, pruned or merged if asked."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, PreTrainedModel

from ..adapters.pruning import Pruned, prune
from ..adapters.saved import LORA_NAME, Saved, read_saved
from ..errors import StructLoRAError
from .parser import parser_of
from .refusing import refusing

_DESCRIPTION = """Write the plain LoRA adapter of a run's output or of a checkpoint: of one process, DDP, FSDP2 or DeepSpeed ZeRO,
and of what DeepSpeed's zero_to_fp32.py made inside a checkpoint (its fp32 masters are latent factors: the map is applied).
The result loads in PEFT, and needs nothing of this package.

--prune T drops each direction whose gate is open with probability below T: row j of lora_A and column j of lora_B. Ranks then
differ by module; `rank_pattern` and `alpha_pattern` of the result say so to PEFT, and keep each module's scale. What it costs
is measured: the base model with the adapter before and after, on a probe batch of random tokens, or of a text with --probe.

--merge writes the base model with the adapter merged into it, in the base model's own precision.

llama.cpp: convert_lora_to_gguf.py takes the unpruned adapter. llama.cpp divides one alpha by each module's own rank, so a
pruned or rank-stabilised adapter has other scales there: merge it, and convert the merged model.
"""
_EXAMPLES = """examples:
  structlora export out/checkpoint-500 adapter
  structlora export out small --prune 0.05 --probe sample.txt
  structlora export out merged --merge
"""
_PROBE_SHAPE = (4, 64)  # rows, tokens
_PROBE_SEED = 0


class Change(NamedTuple):
    """What pruning does to the output, on a probe batch."""

    rows: int
    tokens: int
    largest: float  # |Δlogit|
    divergence: float  # mean KL of next-token distributions, nats
    agreement: float  # share of equal next tokens


def run(command: str, arguments: list[str]) -> None:
    """Write the adapter or the merged model, and print what was done.

    Raises:
        StructLoRAError: no adapter to read, one that cannot be pruned, a base model that cannot be loaded, or an output folder
            that is not empty.
    """
    parser = parser_of(command, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint or adapter")
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    parser.add_argument("--prune", type=float, metavar="T", help="drop directions with an openness below T")
    parser.add_argument("--merge", action="store_true", help="write the merged model instead of the adapter")
    parser.add_argument("--base", metavar="MODEL", help="base model; default: the one named in adapter_config.json")
    parser.add_argument("--probe", metavar="FILE", help="text to measure pruning on, or 'none' to skip it")
    given = parser.parse_args(arguments)
    if given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
        raise StructLoRAError(f"{given.out}, which is not empty", "a new or empty folder", "name another, or empty it")
    saved = read_saved(given.checkpoint)
    base_name = given.base or saved.lora.base_model_name_or_path
    lora, tensors = saved.lora, saved.tensors
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as part:
        _write_adapter(Path(whole), lora, tensors)
        source = whole
        base = None
        if given.prune is not None:
            pruned = prune(saved, given.prune)
            lora, tensors, source = pruned.lora, pruned.tensors, part
            _write_adapter(Path(part), lora, tensors)
            print(size_table(saved, pruned, Path(whole), Path(part)))
            if given.probe != "none":
                base = load_base(base_name, lora)
                print(_measured(base, base_name, whole, part, given.probe))
        if given.merge:
            model = PeftModel.from_pretrained(load_base(base_name, lora), source)
            model.merge_and_unload().save_pretrained(given.out)
        else:
            _write_adapter(given.out, lora, tensors)
    _copy_tokenizer(saved.folder, base_name, given.out, needed=given.merge)
    print(f"Wrote {'the merged model' if given.merge else 'a plain LoRA adapter'} to {given.out}.")


def size_table(saved: Saved, pruned: Pruned, whole: Path, part: Path) -> str:
    """Directions, parameters and bytes, before and after; then the directions of each kind."""
    before, after = _counts(saved.tensors), _counts(pruned.tensors)
    rows = [
        ("directions", sum(k.depth_count * k.rank for k in saved.kinds), sum(map(len, pruned.kept.values()))),
        ("LoRA parameters", before, after),
        (
            SAFETENSORS_WEIGHTS_NAME + " (bytes)",
            *((f / SAFETENSORS_WEIGHTS_NAME).stat().st_size for f in (whole, part)),
        ),
    ]
    for kind in saved.kinds:
        rows.append(
            (f"directions of {kind.name}", kind.depth_count * kind.rank, sum(len(pruned.kept[m]) for m in kind.modules))
        )
    width = max(len(name) for name, *_ in rows)
    lines = [f"{'':{width}}  {'before':>12}  {'after':>12}  {'kept':>7}"]
    lines += [f"{name:{width}}  {old:>12,}  {new:>12,}  {new / old:>7.1%}" for name, old, new in rows]
    if pruned.spared:
        lines.append(
            f"{len(pruned.spared)} modules are wholly closed; each keeps its most open direction (PEFT knows no rank 0)."
        )
    return "\n".join(lines)


def load_base(name: str | None, lora: LoraConfig) -> PreTrainedModel:
    """The base model an adapter was trained on, in its own precision.

    Raises:
        StructLoRAError: it cannot be loaded.
    """
    if not name:
        raise StructLoRAError("no base model named in adapter_config.json", "its name or path", "give `--base MODEL`")
    with refusing(f"loading the base model {name}", "the model that the adapter was trained on", "give `--base MODEL`"):
        architectures = AutoConfig.from_pretrained(name).architectures or [None]
        model_class = getattr(transformers, architectures[0] or "", AutoModelForCausalLM)
        return model_class.from_pretrained(name, dtype="auto")


@torch.no_grad()
def output_change(base: PreTrainedModel, before: str, after: str, tokens: Tensor, mask: Tensor) -> Change:
    """Compare two adapters of one model in plain PEFT.

    Args:
        base (`PreTrainedModel`): the model.
        before, after (`str`): folders of the adapters.
        tokens, mask (`Tensor`): (rows, length) token ids, and 1 where they count.
    """
    model = PeftModel.from_pretrained(base, before, adapter_name="before").eval()
    model.load_adapter(after, adapter_name="after")
    logits = []
    for name in ("before", "after"):
        model.set_adapter(name)
        logits.append(model(input_ids=tokens, attention_mask=mask).logits.float()[mask.bool()])  # (n, classes)
    old, new = (part.log_softmax(-1) for part in logits)
    return Change(
        *tokens.shape,
        largest=float((logits[0] - logits[1]).abs().max()),
        divergence=float((old.exp() * (old - new)).sum(-1).mean()),
        agreement=float((old.argmax(-1) == new.argmax(-1)).float().mean()),
    )


def _measured(base: PreTrainedModel, base_name: str, before: str, after: str, text: str | None) -> str:
    if text is None:
        tokens, what = _random_tokens(base), "random tokens"
        mask = torch.ones_like(tokens)
    else:
        with refusing("reading the probe text", "a text file and the base model's tokenizer", "correct `--probe`"):
            tokenizer = AutoTokenizer.from_pretrained(base_name)
            ids = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"][: _PROBE_SHAPE[0] * _PROBE_SHAPE[1]]
        tokens, what = torch.tensor([ids]), f"tokens of {text}"
        mask = torch.ones_like(tokens)
    change = output_change(base, before, after, tokens, mask)
    return (
        f"Output change on {change.rows} x {change.tokens} {what}: largest |Δlogit| {change.largest:.3g}, "
        f"mean KL {change.divergence:.3g} nats, same next token {change.agreement:.1%}"
    )


def _random_tokens(base: PreTrainedModel) -> Tensor:
    settings = base.config.to_dict()
    special = {v for k, v in settings.items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)}
    usable = torch.tensor([i for i in range(base.get_input_embeddings().num_embeddings) if i not in special])
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    return usable[torch.randint(len(usable), _PROBE_SHAPE, generator=generator)]


def _counts(tensors: dict[str, Tensor]) -> int:
    return sum(value.numel() for name, value in tensors.items() if LORA_NAME.match(name))


def _write_adapter(folder: Path, lora: LoraConfig, tensors: dict[str, Tensor]) -> None:
    lora.inference_mode = True
    lora.save_pretrained(str(folder))
    save_file(
        {name: value.contiguous() for name, value in tensors.items()},
        folder / SAFETENSORS_WEIGHTS_NAME,
        {"format": "pt"},
    )


def _copy_tokenizer(folder: Path, base_name: str, out: Path, needed: bool) -> None:
    """The run's own tokenizer or processor, and for a merged model else the base's."""
    for source in (str(folder), *([base_name] if needed else [])):
        for kind in (AutoProcessor, AutoTokenizer):
            try:
                kind.from_pretrained(source).save_pretrained(out)
                return
            except (OSError, ValueError, KeyError):
                continue
