"""Writing a finished adapter: plain LoRA, smaller if asked, or merged into its base; what that costs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel

from ..errors import StructLoRAError, refuse_used, refusing
from .distilling import STEPS, Distilled, distil
from .export_options import AUTO, NO_PROBE, RANDOM, Options, Sizes, sizes_of
from .load_adapter import Saved
from .measuring import (
    Change,
    Losses,
    Outputs,
    Probe,
    Scaled,
    base_of,
    change_of,
    choose_scale,
    gate_information,
    load_base,
    on_base,
    outputs_of,
    put,
    rank_moments,
    text_probe,
)
from .peft_scaling import (
    LORA_NAME,
    base_is_moved,
    base_is_moved_for_good,
    factor_names,
    rank_of,
    refuse_unscalable,
    scaled,
    with_one_scale,
    with_singular_directions,
)
from .pruning import Pruned, refuse_rank, select, shrink
from .pruning import prune as prune_zeros
from .rows import Rows, read_rows
from .servers import SERVERS, refuse_for

_PREFIX = "base_model.model."  # of PEFT's names
_TELL = 64  # rows of the data that tell which directions to keep, and most on which the loss is measured
_LEARN = 1024  # most rows that are read where the smaller adapter learns from them
_SHARES = [2.0**-i for i in reversed(range(7))]  # sizes at which the loss is measured


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
        rank (`int`, *optional*): give every module this rank, and keep what its output needs most on the rows
            of `data`, or without data the largest singular values; see `shrink`.
        keep (`float` or `str`, *optional*): keep a share of all directions (0.25), or those that carry a
            share of the information ("99%"), over the whole model; see `select`. Ranks differ then.
        prune (`bool`, *optional*, defaults to False): drop directions that add nothing, as `keep` leaves them.
        max_rank (`int`, *optional*): with `keep`, most directions of a module.
        data (`str`, `Path` or rows, *optional*): examples that tell which directions to keep, and what the loss
            becomes: what `read_rows` reads, or inputs of the model with `labels`, one example each. The first
            64 tell; the loss is of the next 64 where there are more.
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
    rank: Sequence[int] = (),
    keep: Sequence[float | str] = (),
    **options,
) -> list[Export]:
    """Write an adapter at several sizes, each to a folder of its own in `out`: "rank-4", "keep-0.25".

    Args:
        saved, out: as for `export`.
        rank, keep (`Sequence`, *optional*): the sizes, of one of them.
        **options: further ones of `export`.

    Raises:
        StructLoRAError: as for `export`.
    """
    return write(saved, Path(out), sizes_of(rank, keep, named=True), Options(**options))


def write(saved: Saved, out: Path, sizes: Sizes, options: Options) -> list[Export]:
    """Write the adapter as it is, or the sizes, each to the folder of its name within `out`; see `export`."""
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
    saved, base_name, revision = _with_base(saved, options.base)
    if server:
        refuse_for(server, saved.lora, saved.tensors)
    is_chosen = any(rule != "prune" for rule, _ in sizes.values())
    rows = None
    if scale == AUTO or (is_chosen and (options.data is not None or options.probe == RANDOM)):
        count = _LEARN if distil else 2 * _TELL
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
    # The result is made beside its place, on the same disk, and moved: an error leaves nothing of it.
    near = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    done = []
    with (
        _writing(out),
        tempfile.TemporaryDirectory() as scratch,
        tempfile.TemporaryDirectory(prefix=".export-", dir=near) as unfinished,
    ):
        trial = _Trial(saved, base_name, revision, rows, options.probe, Path(scratch), is_chosen)
        for name, (rule, value) in (sizes or {"": (None, None)}).items():
            result = Path(unfinished, "result", name)
            written = Export(out / name, rows=rows)
            pruned = written.pruned = _smaller(saved, rule, value, options.max_rank, one_rank, trial)
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
            tensors = _in_dtype(tensors, options.dtype)
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
        out.mkdir(parents=True, exist_ok=True)
        for path in Path(unfinished, "result").iterdir():
            path.rename(out / path.name)
    return done


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Turn an error about the disk into ours; those about models and data have their own by then."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        message = " ".join(str(error).split()).rstrip(".")
        raise StructLoRAError(
            f"that writing {out} failed ({message})",
            "room on the disk and permission to write, there and in the folder for temporary files "
            f"({tempfile.gettempdir()}, which TMPDIR names)",
            "free some space, or name another folder",
        ) from error


def _smaller(
    saved: Saved, rule: str | None, value, max_rank: int | None, one_rank: bool, trial: _Trial
) -> Pruned | None:
    if rule == "prune":
        return prune_zeros(saved, one_rank)
    if rule == "keep":
        return select(saved, value, trial.information(), max_rank, one_rank)
    if rule == "rank":
        return shrink(saved, value, trial.moments())
    return None


class _Trial:
    """The base model with the adapter on it, loaded when it is first asked for: what directions are worth on
    some rows, and what smaller ones do to the output.

    Smaller adapters take the place of the whole one's factors in the one model, with zeros for what they lack.
    """

    def __init__(
        self,
        saved: Saved,
        base_name: str | None,
        revision: str | None,
        rows: Rows | None,
        probe: str,
        scratch: Path,
        is_chosen: bool,
    ):
        self._saved, self._base = saved, (base_name, revision)
        self._rows, self._named, self._scratch, self._is_chosen = rows, probe, scratch, is_chosen
        # Where directions are chosen, they are the singular ones.
        self.whole = with_singular_directions(saved.lora, saved.tensors)[0] if is_chosen else saved.tensors
        self._model: PeftModel | None = None
        self._probe: Probe | None = None
        self._before: Outputs | None = None
        self._alone: float | None = None
        self._information: dict[str, Tensor] | None = None
        self._moments: dict[str, Tensor] | None = None

    @property
    def model(self) -> PeftModel:
        if self._model is None:
            folder = self._scratch / "whole"
            write_adapter(folder, self._saved.lora, self.whole)
            name, revision = self._base
            place = "auto" if torch.accelerator.is_available() else None
            with torch.random.fork_rng():
                torch.manual_seed(
                    0
                )  # weights that no file holds are drawn at random: the same ones each time
                base = load_base(name, self._saved.lora, self._saved.tensors, revision, device_map=place)
            if self._rows is None:
                self._probe = text_probe(base, name, revision, self._named, self._saved.lora)
            else:
                self._probe = _held_out(self._rows, self._is_chosen)
            self._model = on_base(base, folder)
            put(self._model, self.whole)  # which looks at the names, too
        return self._model

    def information(self) -> dict[str, Tensor] | None:
        if self._rows is not None and self._information is None:
            self._information = gate_information(self.model, self._rows.rows[:_TELL])
        return self._information

    def moments(self) -> dict[str, Tensor] | None:
        if self._rows is not None and self._moments is None:
            put(self.model, self.whole)
            self._moments = rank_moments(self.model, self._rows.rows[:_TELL])
        return self._moments

    def distilled(self, small: dict[str, Tensor], steps: int) -> tuple[dict[str, Tensor], Distilled]:
        rows = self._rows.rows
        learned = [*rows[:_TELL], *rows[2 * _TELL :]] if len(rows) > _TELL else rows
        found = distil(self.model, self.whole, small, learned, steps)
        return found.tensors, found

    def scaled(self, tensors: dict[str, Tensor]) -> Scaled:
        return choose_scale(self.model, tensors, self._probe)  # the model's loading makes the probe

    def change(
        self, cut: dict[str, Tensor], taught: dict[str, Tensor] | None, dtype: str | None
    ) -> Change | None:
        """What a smaller adapter does, as its file will have it; None where nothing is measured."""
        if self._rows is None and self._named == NO_PROBE:
            return None
        model = self.model
        if self._before is None:
            put(model, self.whole)
            self._before = outputs_of(model, self._probe.rows)
            if self._before.loss is not None and _base_is_beneath(self._saved.lora):
                with model.disable_adapter():
                    self._alone = outputs_of(model, self._probe.rows).loss
        found = []
        for tensors in (cut, taught):
            if tensors is not None:
                put(model, _in_dtype(tensors, dtype))
                found.append(outputs_of(model, self._probe.rows))
        losses = None
        if self._before.loss is not None:
            at_cut = found[0].loss if len(found) > 1 else None
            losses = Losses(self._alone, self._before.loss, found[-1].loss, at_cut)
        return change_of(self._probe.name, self._before, found[-1], losses)


def _base_is_beneath(lora: LoraConfig) -> bool:
    """Whether the model without the adapter is its base model, and not one that the adapter has changed."""
    return lora.bias == "none" and not lora.layer_replication and not base_is_moved(lora)


def _in_dtype(tensors: dict[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    if dtype is None:
        return tensors
    return {name: x.to(getattr(torch, dtype)) if x.is_floating_point() else x for name, x in tensors.items()}


def _merge(base: PreTrainedModel, tensors: dict[str, Tensor], adapter: Path, out: Path) -> None:
    _refuse_tied(base, {*factor_names(tensors)})
    model = on_base(base, adapter)
    with refusing(
        "merging the adapter",
        "an update that the base model's weights can hold",
        "export without merging",
        (RuntimeError,),
    ):
        model.merge_and_unload().save_pretrained(out)


class SizeCurve(NamedTuple):
    """What a smaller adapter keeps of one thing: points (share of directions, value) by their order, and
    values to compare with, by name.
    """

    value: str
    orders: dict[str, list[tuple[float, float]]]
    levels: dict[str, float] = {}  # noqa: RUF012 - of a tuple, never written to


def information_curves(
    saved: Saved, data: str | Path | Sequence[dict] | None, base: str | None = None, split: str | None = None
) -> list[SizeCurve]:
    """What smaller adapters would keep at each size: of the information, and the loss: over the whole model
    (`select`), by information and by singular values, and with one rank for all modules (`shrink`).

    Args:
        saved (`Saved`): any adapter.
        data, split, base: as for `export`.

    Raises:
        StructLoRAError: as for `export`.
    """
    saved, base_name, revision = _with_base(saved, base)
    rows = read_rows(data, saved, base_name, revision, 2 * _TELL, split)
    with tempfile.TemporaryDirectory() as scratch:
        trial = _Trial(saved, base_name, revision, rows, NO_PROBE, Path(scratch), is_chosen=True)
        information, moments = trial.information(), trial.moments()
    measured, directions = _held_out(rows, is_chosen=True).rows, sum(x.numel() for x in information.values())
    largest = max(rank_of(saved.lora, module) for module in information)
    orders = {
        "most information": (partial(select, saved, information=information), _SHARES),
        "largest singular values": (partial(select, saved), _SHARES),
        "one rank for all modules": (
            partial(shrink, saved, moments=moments),
            sorted({max(1, round(share * largest)) for share in _SHARES}),
        ),
    }
    carried, losses = {}, {name: [] for name in orders}
    for name, (make, sizes) in orders.items():
        for size in sizes:
            pruned = make(size)
            share = pruned.count / directions
            put(trial.model, pruned.masked())
            losses[name].append((share, outputs_of(trial.model, measured).loss))
            if not pruned.one_rank:  # whose directions are of another basis
                carried.setdefault(name, [(0.0, 0.0)]).append((share, _carried(pruned, information)))
    levels = {}
    if _base_is_beneath(saved.lora):
        with trial.model.disable_adapter():
            levels["base model"] = outputs_of(trial.model, measured).loss
    return [SizeCurve("share of the information", carried), SizeCurve("loss", losses, levels)]


def _carried(pruned: Pruned, information: dict[str, Tensor]) -> float:
    """Which share of the information the directions kept carry."""
    kept = (information[m][e, d].sum() for m, experts in pruned.kept.items() for e, d in enumerate(experts))
    return float(sum(kept) / sum(x.sum() for x in information.values()))


def _with_base(saved: Saved, base: str | None) -> tuple[Saved, str | None, str | None]:
    """The adapter as it loads onto its base model, and that model's name and revision."""
    name, revision = base_of(saved, base)
    # The one given is as training left it: nothing more is to be taken out of it.
    if base_is_moved_for_good(saved.lora):
        lora = deepcopy(saved.lora)
        lora.init_lora_weights, lora.base_model_name_or_path, lora.revision = True, name, revision
        saved = replace(saved, lora=lora)
    return saved, name, revision


def _held_out(rows: Rows, is_chosen: bool) -> Probe:
    """The rows to measure the loss on: others than those that chose directions."""
    if not is_chosen:
        return Probe(rows.rows, f"{len(rows.rows)} rows")
    others = rows.rows[_TELL : 2 * _TELL]
    if others:
        return Probe(others, f"{len(others)} other rows")
    return Probe(rows.rows, f"the same {len(rows.rows)} rows")


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


def _refuse_tied(base: PreTrainedModel, adapted: set[str]) -> None:
    """Stop where LoRA adds to the embeddings or to a head that shares their weight: merged, they would differ."""
    head = base.get_output_embeddings()
    if getattr(head, "weight", None) is None or head.weight is not base.get_input_embeddings().weight:
        return
    modules = (head, base.get_input_embeddings())
    if adapted & {f"{_PREFIX}{name}" for name, module in base.named_modules() if module in modules}:
        raise StructLoRAError(
            f"LoRA on embeddings that {type(base).__name__} shares with its head, in a model to merge",
            "adapted weights that only one module uses",
            "export without merging, and load the adapter with PEFT",
        )


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
        *([(base_name, {"revision": revision} if revision else {})] if base_name else []),
    ]
    for source, options in sources:
        for kind in (AutoProcessor, AutoTokenizer):
            try:
                kind.from_pretrained(source, **options).save_pretrained(out)
                return
            except (OSError, ValueError, KeyError):
                continue
