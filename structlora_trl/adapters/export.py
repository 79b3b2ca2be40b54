"""Writing a finished adapter: plain LoRA, smaller if asked, or merged into its base; what that costs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel

from ..core.selection import best
from ..errors import StructLoRAError, refuse_unwritable, refusing
from .load_adapter import Saved
from .measuring import (
    NO_PROBE,
    RANDOM,
    Change,
    Probe,
    Row,
    base_of,
    gate_information,
    load_base,
    mean_loss,
    on_base,
    output_change,
    text_probe,
)
from .peft_scaling import LORA_NAME, base_is_moved_for_good, with_one_scale, with_singular_directions
from .pruning import Pruned, prune, select
from .rows import read_rows

_PREFIX = "base_model.model."  # of PEFT's names
_ROWS = 64  # rows of the data that the information is of, and as many again for the loss
_SHARES = [2.0**-i for i in reversed(range(7))]  # sizes at which the loss is measured


class Size(NamedTuple):
    """One line of what pruning saves: `what` is counted, `before` and `after` it."""

    what: str
    before: int
    after: int


@dataclass
class Export:
    """What `export` wrote, and what a smaller adapter costs.

    Args:
        sizes (`list[Size]`): directions, parameters and bytes; empty where nothing was to be dropped.
        pruned (`Pruned`, *optional*): the directions kept; None where nothing was to be dropped.
        change (`Change`, *optional*): None where nothing was to be dropped, or nothing measured.
    """

    sizes: list[Size]
    pruned: Pruned | None = None
    change: Change | None = None


def export(
    saved: Saved,
    out: str | Path,
    *,
    prune_below: float | None = None,
    keep: float | str | None = None,
    data: str | Path | Sequence[Row] | None = None,
    one_rank: bool = False,
    merge: bool = False,
    base: str | None = None,
    probe: str = RANDOM,
) -> Export:
    """Write a plain LoRA adapter, or the merged model.

    Args:
        saved (`Saved`): what `read_saved` found: of StructLoRA, or any LoRA adapter of PEFT.
        out (`str` or `Path`): folder to write, new or empty.
        prune_below (`float`, *optional*): drop directions that are open with a probability below it.
        keep (`float` or `str`, *optional*): keep a share of all directions (0.25), or those that carry a
            share of the information ("99%"); see `select`.
        data (`str`, `Path` or list of rows, *optional*): examples that tell which directions to keep
            (`gate_information`), and what the loss becomes: a file that `read_rows` reads, or inputs of the
            model with `labels`, one example each. The first 64 tell; the loss is of the next 64 where there
            are more. Without it the largest singular values are kept, usually the worse choice, for they do
            not know the task.
        one_rank (`bool`, *optional*, defaults to False): fill all modules up to one rank with zeros, so that
            `lora_alpha / r` is every module's scale.
        merge (`bool`, *optional*, defaults to False): write the base model with the adapter merged into it.
        base (`str`, *optional*): the base model; the one that the adapter's configuration names where
            omitted.
        probe (`str`, *optional*, defaults to `"random"`): what the change of the output is measured on where
            there is no `data`: random inputs, a text file, or `"none"`.

    Returns:
        `Export`.

    Raises:
        StructLoRAError: a folder that is not empty, or a file in its place; an adapter that cannot be made
            smaller; a base model that cannot be loaded or probed, or one that training changed in a way that
            PEFT does not repeat. Nothing is written then.
    """
    out = Path(out)
    refuse_unwritable(out)
    if out.exists() and any(out.iterdir()):
        raise StructLoRAError(
            f"{out}, which is not empty", "a new or empty folder", "name another, or empty it"
        )
    if prune_below is not None and keep is not None:
        raise StructLoRAError(
            "both `prune_below` and `keep`", "one rule for what to drop", "give one of them"
        )
    if merge and saved.lora.layer_replication:
        raise StructLoRAError(
            "`layer_replication`, whose copies of a layer share its weights, in an adapter to merge",
            "adapted weights that only one module uses",
            "export without merging",
        )
    saved, base_name, revision = _with_base(saved, base)
    lora, tensors = saved.lora, saved.tensors
    done = Export([])
    # The result is made beside its place, on the same disk, and moved: an error leaves nothing of it.
    near = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    with (
        tempfile.TemporaryDirectory() as scratch,
        tempfile.TemporaryDirectory(prefix=".export-", dir=near) as unfinished,
    ):
        before, after, result = Path(scratch, "before"), Path(scratch, "after"), Path(unfinished, "result")
        load = _loading(saved, base_name, revision)
        if prune_below is not None:
            done.pruned = prune(saved, prune_below)
        elif keep is not None:
            rows = _rows(data, saved, base_name, revision)
            information = None
            if rows:
                write_adapter(Path(scratch, "singular"), lora, with_singular_directions(lora, tensors)[0])
                information = gate_information(on_base(load(), Path(scratch, "singular")), rows[:_ROWS])
            done.pruned = select(saved, keep, information)
        if done.pruned:
            lora, tensors = done.pruned.lora, done.pruned.tensors
        if one_rank:
            lora, tensors = with_one_scale(lora, tensors, {}, one_rank=True)
        write_adapter(after, lora, tensors)
        if done.pruned:
            write_adapter(before, saved.lora, saved.tensors)
            done.sizes = _sizes(saved, done.pruned, tensors, before, after)
            if keep is not None and rows:
                on = _held_out(rows)
                done.change = output_change(load, before, after, lambda _: on)
            elif probe != NO_PROBE:
                done.change = output_change(
                    load, before, after, lambda model: text_probe(model, base_name, revision, probe, lora)
                )
        if merge:
            model = load_base(base_name, saved.lora, saved.tensors, revision)
            _untie(model, lora, {match["module"] for name in tensors if (match := LORA_NAME.match(name))})
            model = on_base(model, after)
            with refusing(
                "merging the adapter",
                "an update that the base model's weights can hold",
                "export without merging",
                (RuntimeError,),
            ):
                model.merge_and_unload().save_pretrained(result)
        else:
            write_adapter(result, lora, tensors)
        _copy_processor(saved.folder, base_name if merge else None, revision, result)
        out.mkdir(parents=True, exist_ok=True)
        for path in result.iterdir():
            path.rename(out / path.name)
    return done


class SizeCurve(NamedTuple):
    """What a smaller adapter keeps of one thing: points (share of directions, value) by their order."""

    value: str
    orders: dict[str, list[tuple[float, float]]]


def information_curves(
    saved: Saved, data: str | Path | Sequence[Row], base: str | None = None
) -> list[SizeCurve]:
    """What `export(..., keep=..., data=data)` would keep at each size: of the information, and the loss.

    Args:
        saved (`Saved`): any adapter.
        data, base: as for `export`.

    Raises:
        StructLoRAError: as for `export`.
    """
    saved, base_name, revision = _with_base(saved, base)
    rows = _rows(data, saved, base_name, revision)
    tensors, sigma = with_singular_directions(saved.lora, saved.tensors)
    with tempfile.TemporaryDirectory() as scratch:
        write_adapter(Path(scratch, "singular"), saved.lora, tensors)
        model = on_base(_loading(saved, base_name, revision)(), Path(scratch, "singular"))
    information = gate_information(model, rows[:_ROWS])
    worth = {"most information": information, "largest singular values": sigma}
    select(saved, 1.0, information)  # which stops where no direction is worth anything
    known = torch.cat([information[module].flatten() for module in sigma]).double()
    weights = {LORA_NAME.match(name)["module"]: B for name, B in model.named_parameters() if B.requires_grad}
    whole = {module: B.detach().clone() for module, B in weights.items()}
    carried, losses = {name: [(0.0, 0.0)] for name in worth}, {name: [] for name in worth}
    for name, values in worth.items():
        flat = torch.cat([values[module].flatten() for module in sigma])
        for share in _SHARES:
            kept = best(flat, share)
            parts = kept.split([x.numel() for x in sigma.values()])
            for (module, x), part in zip(sigma.items(), parts, strict=True):
                # lora_B's columns are in the order (r, expert).
                columns = part.view_as(x).T.reshape(1, -1, *[1] * (weights[module].ndim - 2))
                weights[module].data.copy_(whole[module] * columns.to(whole[module]))
            carried[name].append((share, float(known[kept].sum() / known.sum())))
            losses[name].append((share, mean_loss(model, _held_out(rows).rows)))
    return [SizeCurve("share of the information", carried), SizeCurve("loss", losses)]


def _with_base(saved: Saved, base: str | None) -> tuple[Saved, str | None, str | None]:
    """The adapter as it loads onto its base model, and that model's name and revision."""
    name, revision = base_of(saved, base)
    # The one given is as training left it: nothing more is to be taken out of it.
    if base_is_moved_for_good(saved.lora):
        lora = deepcopy(saved.lora)
        lora.init_lora_weights, lora.base_model_name_or_path, lora.revision = True, name, revision
        saved = replace(saved, lora=lora)
    return saved, name, revision


def _loading(saved: Saved, base_name: str | None, revision: str | None):
    """How to load the base model for measuring: on a GPU where there is one."""
    return lambda: load_base(
        base_name,
        saved.lora,
        saved.tensors,
        revision,
        device_map="auto" if torch.accelerator.is_available() else None,
    )


def _rows(
    data: str | Path | Sequence[Row] | None, saved: Saved, base_name: str | None, revision: str | None
) -> list[Row]:
    if data is None:
        return []
    if isinstance(data, (str, Path)):
        return read_rows(data, saved, base_name, revision, 2 * _ROWS)
    if not data:
        raise StructLoRAError("no rows in `data`", "some examples", "give some, or leave `data` out")
    return [*data]


def _held_out(rows: list[Row]) -> Probe:
    """The rows to measure the loss on."""
    others = rows[_ROWS : 2 * _ROWS]
    return Probe(others, f"{len(others)} other rows") if others else Probe(rows, f"the same {len(rows)} rows")


def write_adapter(folder: Path, lora: LoraConfig, tensors: dict[str, Tensor]) -> None:
    """Write PEFT's two files."""
    lora = deepcopy(lora)
    lora.inference_mode = True
    lora.save_pretrained(str(folder))
    save_file(
        {name: value.contiguous() for name, value in tensors.items()},
        folder / SAFETENSORS_WEIGHTS_NAME,
        {"format": "pt"},
    )


def _untie(base: PreTrainedModel, lora: LoraConfig, adapted: set[str]) -> None:
    """Give a head tied to the embeddings its own weight where LoRA adds to either: merged, they differ.

    Raises:
        StructLoRAError: the head cannot have its own weight.
    """
    head = base.get_output_embeddings()
    if getattr(head, "weight", None) is None:
        return
    embeddings = base.get_input_embeddings()
    tied = {
        f"{_PREFIX}{name}" for name, module in base.named_modules() if module is embeddings or module is head
    }
    if head.weight is not embeddings.weight or not tied & adapted:
        return
    if getattr(lora, "ensure_weight_tying", False):  # PEFT leaves the head of an untied model without LoRA
        raise StructLoRAError(
            "LoRA with `ensure_weight_tying` on embeddings and head that share one weight, in a model to merge",
            "adapted weights that only one module uses",
            "export without merging, and load the adapter with PEFT",
        )
    # With more than two uses of the weight; T5 scales by whether it is tied.
    if base.config.is_encoder_decoder:
        raise StructLoRAError(
            f"LoRA on embeddings that {type(base).__name__} shares with its head, in a model to merge",
            "adapted weights that only one module uses",
            "export without merging",
        )
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False


def _sizes(saved: Saved, pruned: Pruned, written: dict[str, Tensor], before: Path, after: Path) -> list[Size]:
    """Directions, parameters and bytes; then the directions of each kind."""
    counts = [
        sum(value.numel() for name, value in tensors.items() if LORA_NAME.match(name))
        for tensors in (saved.tensors, written)
    ]
    kinds = [
        Size(
            f"directions of {kind.name}",
            kind.depth_count * kind.experts * kind.rank,
            sum(len(expert) for module in kind.modules for expert in pruned.kept[module]),
        )
        for kind in saved.kinds
    ]
    return [
        Size("directions", sum(kind.before for kind in kinds), sum(kind.after for kind in kinds)),
        Size("LoRA parameters", *counts),
        Size(
            f"{SAFETENSORS_WEIGHTS_NAME} (bytes)",
            *((folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size for folder in (before, after)),
        ),
        *kinds,
    ]


def _copy_processor(folder: Path, base_name: str | None, revision: str | None, out: Path) -> None:
    """The run's own tokenizer or processor, or else the base's where one is named."""
    sources = [
        (str(folder), {}),
        *([(base_name, {"revision": revision} if revision else {})] if base_name else []),
    ]
    for source, options in sources:
        for kind in (AutoProcessor, AutoTokenizer):
            try:
                kind.from_pretrained(source, **options).save_pretrained(out)
                return
            except (OSError, ValueError, KeyError):
                continue
