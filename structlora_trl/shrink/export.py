"""Writing a finished adapter: plain LoRA, smaller if asked, or merged into its base; what that costs."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel

from ..errors import StructLoRAError, refuse_used, refusing, writing
from .base_model import at_revision, in_dtype, load_base, on_base, with_base, write_adapter
from .distilling import STEPS, Distilled
from .export_options import AUTO, RANDOM, Options, Sizes, sizes_of
from .load_adapter import Saved
from .measuring import Change, Scaled
from .peft_scaling import (
    LORA_NAME,
    base_is_moved_for_good,
    factor_names,
    refuse_unscalable,
    scaled,
    ties_adapted,
    with_one_scale,
)
from .pruning import Pruned, refuse_rank, select, shrink
from .pruning import prune as prune_zeros
from .rows import Rows, read_rows
from .servers import SERVERS, refuse_for, refuse_rank_for
from .trial import TELL, Trial

logger = logging.getLogger(__name__)

_PREFIX = "base_model.model."  # of PEFT's names
_LEARN = 1024  # most rows that are read where the smaller adapter learns from them


class Size(NamedTuple):
    """One line of what a smaller adapter saves: `what` is counted, `before` and `after` it."""

    what: str
    before: int
    after: int


@dataclass
class Export:
    """What `export` wrote, and what a smaller adapter costs.

    Args:
        folder (`Path`): where it lies.
        sizes (`list[Size]`): directions, parameters and bytes; empty where nothing was to be dropped.
        pruned (`Pruned`, *optional*): the directions kept; None where nothing was to be dropped.
        change (`Change`, *optional*): None where nothing was to be dropped, or nothing measured.
        distilled (`Distilled`, *optional*): how near distillation brought it.
        scaled (`Scaled`, *optional*): what its update was multiplied by; None where no `scale` was asked for.
        rows (`Rows`, *optional*): what was read of the data.
    """

    folder: Path
    sizes: list[Size] = field(default_factory=list)
    pruned: Pruned | None = None
    change: Change | None = None
    distilled: Distilled | None = None
    scaled: Scaled | None = None
    rows: Rows | None = None


def export(
    saved: Saved,
    out: str | Path,
    *,
    rank: int | None = None,
    keep: float | str | None = None,
    prune: bool = False,
    max_rank: int | None = None,
    data: str | Path | Sequence[dict] | None = None,
    split: str | None = None,
    distil: bool | int = False,
    scale: float | str | None = None,
    server: str | None = None,
    dtype: str | None = None,
    merge: bool = False,
    base: str | None = None,
    probe: str = RANDOM,
) -> Export:
    """Write a plain LoRA adapter, or the merged model.

    Args:
        saved (`Saved`): what `read_saved` found: of StructLoRA, or any LoRA adapter of PEFT.
        out (`str` or `Path`): folder to write, new or empty.
        rank (`int`, *optional*): give every module this rank; see `shrink`.
        keep (`float` or `str`, *optional*): keep a share of all directions (0.25), or those that carry a
            share of what they are chosen by ("99%"), over the whole model; see `select`. Ranks differ then.
            Without `data` the openness of the gates chooses, where the run has left it.
        prune (`bool`, *optional*, defaults to False): drop directions that add nothing, as `keep` leaves them.
        max_rank (`int`, *optional*): with `keep`, most directions of a module.
        data (`str`, `Path` or rows, *optional*): examples that tell what the loss becomes, and with `keep` which
            directions to keep: what `read_rows` reads, or inputs of the model with `labels`, one example each.
            With `keep` the first 64 tell; with `keep` or `distil` the loss is of the next 64 where there are more.
        split (`str`, *optional*): of `data`.
        distil (`bool` or `int`, *optional*, defaults to False): let the smaller adapter learn the outputs of the
            whole one, on the rows that the loss is not measured on, for that many steps (True: 100); see
            `distilling.distil`.
        scale (`float` or `str`, *optional*): multiply the update ΔW, after any cut, by this number, which goes into
            lora_B; `"auto"`: by the one of 1, 0.85, 0.7, 0.5 and 0.3 at which the loss is lowest on rows that the
            adapter was not trained on: `data`, or the rows that the run held out. See `choose_scale`.
        server (`str`, *optional*): write what that server loads: "vllm", "sglang", "lorax" or "llamacpp".
        dtype (`str`, *optional*): of the file's numbers: "float32", "bfloat16" or "float16"; as they are where
            omitted.
        merge (`bool`, *optional*, defaults to False): write the base model with the adapter merged into it.
        base (`str`, *optional*): the base model; the one that the adapter's configuration names where
            omitted.
        probe (`str`, *optional*, defaults to `"random"`): what the change of the output is measured on where
            there is no `data`: random inputs, a text file, or `"none"`.

    Returns:
        `Export`.

    Raises:
        StructLoRAError: a folder that is not empty, or a file in its place; an adapter that cannot be made
            smaller or scaled, or that the server cannot load; `scale="auto"` without rows; a base model that cannot
            be loaded or probed, or one that training changed in a way that PEFT does not repeat; a full disk.
            Nothing is written then.
    """
    sizes = sizes_of([] if rank is None else [rank], [] if keep is None else [keep], prune)
    options = Options(max_rank, data, split, distil, scale, server, dtype, merge, base, probe)
    return write(saved, Path(out), sizes, options)[0]


def export_sizes(
    saved: Saved,
    out: str | Path,
    *,
    rank: int | Sequence[int] = (),
    keep: float | str | Sequence[float | str] = (),
    **options,
) -> list[Export]:
    """Write an adapter at several sizes, each to a folder of its own in `out`: "rank-4", "keep-0.25".

    Args:
        saved, out: as for `export`.
        rank, keep (*optional*): a size or several, of one of them.
        **options: further ones of `export`, but for `prune`.

    Raises:
        StructLoRAError: as for `export`.
    """
    return write(saved, Path(out), sizes_of(rank, keep, named=True), Options(**options))


def write(saved: Saved, out: Path, sizes: Sizes, options: Options) -> list[Export]:
    """Write the adapter as it is, or the sizes, each to the folder of its name within `out`; see `export`."""
    if not isinstance(saved, Saved):
        raise StructLoRAError(
            f"{saved!r:.60} ({type(saved).__name__}), where an adapter is expected",
            "what `read_saved` makes of its folder",
            "call `export(read_saved(folder), out)`",
        )
    refuse_used(out)
    options.refuse_contradictions(sizes)
    for rule, value in sizes.values():
        refuse_rank(saved, value if rule == "rank" else options.max_rank)
    if options.base is not None and not options.loads_base(sizes) and not base_is_moved_for_good(saved.lora):
        raise StructLoRAError(
            f"`base` {options.base} in an export that loads no base model",
            "`merge`, or a smaller adapter whose cost is measured",
            "remove `base`",
        )
    distil, scale, server, merge = options.distil, options.scale, options.server, options.merge
    if scale is not None:
        refuse_unscalable(saved.lora)
    if merge and saved.lora.layer_replication:
        raise StructLoRAError(
            "`layer_replication`, whose copies of a layer share its weights, in an adapter to merge",
            "adapted weights that only one module uses",
            "export without merging",
        )
    rules = {rule for rule, _ in sizes.values()}
    if (merge or "keep" in rules) and ties_adapted(saved.lora, saved.tensors):
        raise StructLoRAError(
            "LoRA on embeddings and a head that share their factors (`ensure_weight_tying`), in an adapter to merge or with `keep`",
            "factors of its own for each module",
            "give `rank`, which cuts both alike, or export it whole and without merging",
        )
    saved, base_name, revision = with_base(saved, options.base)
    if options.data is not None:
        saved = replace(saved, openness=None)  # rows that are given choose
    if server:
        refuse_for(server, saved.lora, saved.tensors)
    is_cut, rows_choose = bool(rules & {"rank", "keep"}), "keep" in rules and not saved.openness
    rows = None
    if scale == AUTO or (is_cut and (options.data is not None or options.probe == RANDOM)):
        count = _LEARN if distil else TELL if is_cut and not rows_choose else 2 * TELL
        rows = read_rows(options.data, saved, base_name, revision, count, options.split)
    if distil and rows is None:
        raise StructLoRAError(
            "`distil` without rows to learn from",
            "examples of what the adapter is for; no labels are needed",
            "give `--data ROWS`",
        )
    if scale == AUTO and rows is None:
        raise StructLoRAError(
            "`scale` 'auto' without rows",
            "rows with labels that the adapter was not trained on; it has none of its own",
            "give `--data ROWS`",
        )
    one_rank = bool(server and SERVERS[server].one_rank)
    done = []
    with writing(out, (SafetensorError,)) as unfinished, tempfile.TemporaryDirectory() as scratch:
        is_chosen = rows_choose or bool(distil)
        trial = Trial(saved, base_name, revision, rows, options.probe, Path(scratch), is_chosen)
        for name, (rule, value) in (sizes or {"": (None, None)}).items():
            result = unfinished / name
            written = Export(out / name, rows=rows)
            pruned = written.pruned = _smaller(saved, rule, value, options.max_rank, one_rank, trial)
            if server:
                refuse_rank_for(server, (pruned or saved).lora, (pruned or saved).tensors)
            lora, tensors = saved.lora, saved.tensors
            directions = pruned.masked() if pruned else tensors
            if distil:
                directions, written.distilled = trial.distilled(
                    directions, STEPS if distil is True else distil
                )
            if scale is not None:
                written.scaled = trial.scaled(directions) if scale == AUTO else Scaled(scale)
                directions = scaled(directions, written.scaled.scale)
            if pruned:
                lora, tensors = pruned.written(directions)
                shown = directions if distil or scale is not None else None
                written.change = trial.change(pruned.masked(), shown, options.dtype)
            elif server:
                lora, tensors = with_one_scale(lora, directions, {}, one_rank)
            else:
                tensors = directions
            tensors = in_dtype(tensors, options.dtype)
            if pruned:
                written.sizes = _sizes(saved, pruned, tensors)
            if merge:
                after = Path(scratch, "after")
                write_adapter(after, lora, tensors)
                _merge(load_base(base_name, saved.lora, saved.tensors, revision), tensors, after, result)
            else:
                write_adapter(result, lora, tensors)
            _copy_processor(saved.folder, base_name if merge else None, revision, result)
            done.append(written)
    return done


def _smaller(
    saved: Saved, rule: str | None, value, max_rank: int | None, one_rank: bool, trial: Trial
) -> Pruned | None:
    if rule == "prune":
        return prune_zeros(saved, one_rank)
    if rule == "keep":
        information = None if saved.openness else trial.information
        return select(saved, value, information, max_rank, one_rank)
    if rule == "rank":
        return shrink(saved, value)
    return None


def _merge(base: PreTrainedModel, tensors: dict[str, Tensor], adapter: Path, out: Path) -> None:
    if getattr(base, "hf_quantizer", None) is not None:
        raise StructLoRAError(
            "a quantised base model to merge into, which would round the update",
            "a base model of 16 or 32 bits",
            "give the one that was quantised, or this one dequantised and saved (`--base MODEL`)",
        )
    _untie(base, {*factor_names(tensors)})
    model = on_base(base, adapter)
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


def _sizes(saved: Saved, pruned: Pruned, written: dict[str, Tensor]) -> list[Size]:
    """Directions, parameters and bytes."""
    files = (saved.tensors, written)
    parameters = [sum(x.numel() for name, x in tensors.items() if LORA_NAME.match(name)) for tensors in files]
    size = [sum(x.numel() * x.element_size() for x in tensors.values()) for tensors in files]
    whole = sum(len(saved.tensors[names["A"]]) for names in factor_names(saved.tensors).values())
    return [
        Size("directions", whole, pruned.count),
        Size("LoRA parameters", *parameters),
        Size(f"{SAFETENSORS_WEIGHTS_NAME} (bytes)", *size),
    ]


def _copy_processor(folder: Path, base_name: str | None, revision: str | None, out: Path) -> None:
    """The run's own tokenizer or processor, or else the base's where one is named."""
    sources = [
        (str(folder), {}),
        *([(base_name, at_revision(revision))] if base_name else []),
    ]
    for source, options in sources:
        for kind in (AutoProcessor, AutoTokenizer):
            try:
                kind.from_pretrained(source, trust_remote_code=False, **options).save_pretrained(out)
                return
            except Exception as error:  # tokenizers raises bare ones, and an adapter needs none
                why = error
    if (folder / "tokenizer_config.json").is_file():
        logger.warning(
            "The tokenizer in %s cannot be read (%s), and is not copied.", folder, " ".join(str(why).split())
        )
