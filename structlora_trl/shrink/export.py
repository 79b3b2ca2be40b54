"""Writing a finished adapter: plain LoRA, smaller if asked, or merged into its base; what that costs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel

from ..errors import StructLoRAError, refuse_used, refusing, writing
from .base_model import at_revision, in_dtype, load_base, on_base, with_base, write_adapter
from .distilling import STEPS, Distilled
from .export_options import AUTO, NO_ROWS, Options
from .load_adapter import Saved
from .measuring import Losses, Scaled
from .peft_scaling import (
    LORA_NAME,
    base_is_moved,
    factor_names,
    refuse_other_ranks,
    scaled,
    ties_adapted,
    with_one_scale,
)
from .pruning import Pruned, prune, refuse_rank, select, shrink
from .rows import Rows, read_rows
from .servers import SERVERS, refuse_for
from .trial import TELL, Trial

logger = logging.getLogger(__name__)

_PREFIX = "base_model.model."  # of PEFT's names
_LEARN = 1024  # most rows that are read where the smaller adapter learns from them


class Size(NamedTuple):
    """Directions of an adapter, its LoRA parameters, and the bytes of its file."""

    directions: int
    parameters: int
    bytes: int


@dataclass
class Export:
    """What `export` wrote, and what a smaller adapter costs.

    Args:
        folder (`Path`): where it lies.
        before, after (`Size`): of the whole adapter and of the one written.
        pruned (`Pruned`, *optional*): the directions kept; None where nothing was to be dropped.
        losses (`Losses`, *optional*): None where nothing was to be dropped, or there are no rows or labels.
        distilled (`Distilled`, *optional*): how near distillation brought it.
        scaled (`Scaled`, *optional*): what its update was multiplied by; None where no `scale` was asked for.
        rows (`Rows`, *optional*): what was read of the data.
    """

    folder: Path
    before: Size
    after: Size
    pruned: Pruned | None = None
    losses: Losses | None = None
    distilled: Distilled | None = None
    scaled: Scaled | None = None
    rows: Rows | None = None


def export(saved: Saved, out: str | Path, **options) -> Export:
    """Write a plain LoRA adapter, or the merged model.

    Args:
        saved (`Saved`): what `read_saved` found: of StructLoRA, or any LoRA adapter of PEFT.
        out (`str` or `Path`): folder to write, new or empty.
        **options: of `export_options.Options`, with one size at most.

    Returns:
        `Export`.

    Raises:
        StructLoRAError: as `export_sizes`.
    """
    chosen = Options(**options)
    if len(chosen.sizes) > 1:
        raise StructLoRAError("several sizes for `export`", "one", "call `export_sizes`")
    return export_sizes(saved, out, chosen)[0]


def export_sizes(saved: Saved, out: str | Path, options: Options) -> list[Export]:
    """Write an adapter at several sizes, each to a folder of its own in `out` ("rank-4", "keep-0.25"); one to `out` itself.

    Args:
        saved, out: as for `export`.
        options (`Options`): the sizes, and what holds for each of them.

    Raises:
        StructLoRAError: a folder that is not empty, or a file in its place; an adapter that cannot be made
            smaller or scaled, or that the server cannot load; no rows where they are needed; a base model that cannot
            be loaded, or one that training changed in a way that PEFT does not repeat; a full disk. Nothing is
            written then.
    """
    out = Path(out)
    refuse_used(out)
    saved, base_name, revision = with_base(saved, options.base)
    _refuse_unfit(saved, options)
    if options.has_data:
        saved = replace(saved, openness=None)  # rows that are given choose
    rows_choose = options.rule == "keep" and not saved.openness
    rows = None
    if options.data != NO_ROWS and (options.is_cut or options.scale == AUTO):
        count = _LEARN if options.distil else TELL if options.is_cut and not rows_choose else 2 * TELL
        rows = read_rows(options.data, saved, base_name, revision, count, options.split)
    if rows is None and (options.distil or options.scale == AUTO):
        raise StructLoRAError(
            "`distil` or `scale='auto'` without rows",
            "examples of what the adapter is for; for a scale, ones that it was not trained on",
            "give `--data ROWS`",
        )
    trial = Trial(saved, base_name, revision, rows, is_chosen=rows_choose or bool(options.distil))
    done = []
    with writing(out, (SafetensorError,)) as unfinished:
        for name, value in options.sizes.items():
            written, lora, tensors = _smaller(saved, value, out / name, options, trial)
            if options.merge:
                base = load_base(base_name, saved.lora, saved.tensors, revision)
                _merge(base, lora, tensors, unfinished / name)
            else:
                write_adapter(unfinished / name, lora, tensors)
            _copy_processor(saved.folder, base_name if options.merge else None, revision, unfinished / name)
            done.append(written)
    return done


def _refuse_unfit(saved: Saved, options: Options) -> None:
    """Stop at what an adapter does not allow, before the work."""
    lora = saved.lora
    for value in options.sizes.values():
        refuse_rank(saved, value if options.rule == "rank" else options.max_rank)
    if options.rule:
        refuse_other_ranks(lora)
    if options.scale is not None and (lora.use_dora or lora.lora_bias or base_is_moved(lora)):
        raise StructLoRAError(
            "`scale` for an adapter with DoRA's magnitudes, biases (`lora_bias`) or part of the base weights",
            "LoRA whose update is B·A alone",
            "export it without `--scale`",
        )
    if options.server:
        refuse_for(options.server, lora, saved.tensors)
    shared = lora.layer_replication or ties_adapted(lora, saved.tensors)
    if shared and (options.merge or options.rule == "keep"):
        raise StructLoRAError(
            "modules that share weights or factors (`layer_replication`, `ensure_weight_tying`), with `merge` or `keep`",
            "weights and factors of its own for each module",
            "give `rank`, which cuts all alike, or export it whole and without merging",
        )


def _smaller(
    saved: Saved, value, folder: Path, options: Options, trial: Trial
) -> tuple[Export, LoraConfig, dict[str, Tensor]]:
    """Cut, teach, scale and measure an adapter: what is to be told, and PEFT's configuration and tensors."""
    one_rank = bool(options.server and SERVERS[options.server].one_rank)
    pruned = distilled = times = losses = None
    if options.rule == "prune":
        pruned = prune(saved, one_rank)
    elif options.rule == "keep":
        information = None if saved.openness else trial.information
        pruned = select(saved, value, information, options.max_rank, one_rank)
    elif options.rule == "rank":
        pruned = shrink(saved, value)
    cut = directions = pruned.masked() if pruned else saved.tensors
    if options.distil:
        distilled = trial.distilled(cut, STEPS if options.distil is True else options.distil)
        directions = distilled.tensors
    if options.scale is not None:
        times = trial.scaled(directions) if options.scale == AUTO else Scaled(options.scale)
        directions = scaled(directions, times.scale)
    if pruned:
        lora, tensors = pruned.written(directions)
        losses = trial.losses(in_dtype(directions, options.dtype), None if directions is cut else cut)
    elif options.server:
        lora, tensors = with_one_scale(saved.lora, directions, {}, one_rank)
    else:
        lora, tensors = saved.lora, directions
    tensors = in_dtype(tensors, options.dtype)
    before = _size(
        saved.tensors, sum(len(saved.tensors[names["A"]]) for names in factor_names(saved.tensors).values())
    )
    after = _size(tensors, pruned.count if pruned else before.directions)
    return Export(folder, before, after, pruned, losses, distilled, times, trial.rows), lora, tensors


def _size(tensors: dict[str, Tensor], directions: int) -> Size:
    parameters = sum(x.numel() for name, x in tensors.items() if LORA_NAME.match(name))
    return Size(directions, parameters, sum(x.nbytes for x in tensors.values()))


def _merge(base: PreTrainedModel, lora: LoraConfig, tensors: dict[str, Tensor], out: Path) -> None:
    if getattr(base, "hf_quantizer", None) is not None:
        raise StructLoRAError(
            "a quantised base model to merge into, which would round the update",
            "a base model of 16 or 32 bits",
            "give the one that was quantised, or this one dequantised and saved (`--base MODEL`)",
        )
    _untie(base, {*factor_names(tensors)})
    model = on_base(base, lora, tensors)
    with refusing(
        "merging the adapter",
        "an update that the base model's weights can hold",
        "export without merging",
        (RuntimeError,),
    ):
        model.merge_and_unload().save_pretrained(out)


def _untie(base: PreTrainedModel, adapted: set[str]) -> None:
    """Give a head that shares the embeddings' weight one of its own, where LoRA adds to either: merged, they differ."""
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if getattr(head, "weight", None) is None or head.weight is not embeddings.weight:
        return
    if not adapted & {f"{_PREFIX}{n}" for n, module in base.named_modules() if module in (head, embeddings)}:
        return
    # T5 and others compute otherwise, or are tied again, where these are two.
    if base.config.is_encoder_decoder:
        raise StructLoRAError(
            f"LoRA on embeddings that {type(base).__name__} shares with its head, in a model to merge",
            "adapted weights that only one module uses",
            "export without merging, and load the adapter with PEFT",
        )
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False


def _copy_processor(folder: Path, base_name: str | None, revision: str | None, out: Path) -> None:
    """Save the run's own tokenizer or processor, or else the base's where one is named."""
    sources = [(folder, {})] + ([(base_name, at_revision(revision))] if base_name else [])
    for (source, at), kind in product(sources, (AutoProcessor, AutoTokenizer)):
        try:
            kind.from_pretrained(source, trust_remote_code=False, **at).save_pretrained(out)
            return
        except Exception as error:  # tokenizers raises bare ones, and an adapter needs none
            why = " ".join(str(error).split())
    if (folder / "tokenizer_config.json").is_file():
        logger.warning("The tokenizer in %s cannot be read (%s), and is not copied.", folder, why)
