"""Writing a finished adapter: a plain LoRA adapter, pruned if asked, or the base model with it merged; and what pruning costs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)

from ..errors import StructLoRAError
from ..refusing import refusing
from .load_adapter import LORA_NAME, Saved
from .peft_scaling import with_one_rank
from .pruning import Pruned, prune

RANDOM, NO_PROBE = "random", "none"
_PROBE_ROWS, _PROBE_LENGTH = 4, 64  # length in tokens
_PROBE_SEED = 0
_PREFIX = "base_model.model."  # of PEFT's names
# Tasks whose head is not the one that the base model's own configuration names. (Causal language models keep theirs: models of
# pictures and text have the same task type.)
_HEADS = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
}


class Size(NamedTuple):
    """One line of what pruning saves: `what` is counted, `before` and `after` it."""

    what: str
    before: int
    after: int


class Probe(NamedTuple):
    """Inputs to measure on: `inputs` of the model, (rows, ...) each, and a `name` for them."""

    inputs: dict[str, Tensor]
    name: str


class Change(NamedTuple):
    """What pruning does to the output, on the inputs that `probe` names.

    `largest` is the largest difference of a logit, `divergence` the mean KL divergence of the predicted distributions in nats,
    and `agreement` the share of equal predictions.
    """

    probe: str
    largest: float
    divergence: float
    agreement: float


@dataclass
class Export:
    """What `export` wrote, and what pruning did.

    Args:
        sizes (`list[Size]`): directions, parameters and bytes; empty where nothing was pruned.
        spared (`list[str]`): modules that are wholly closed, and keep their most open direction.
        change (`Change`, *optional*): None where nothing was pruned, or nothing measured.
    """

    sizes: list[Size]
    spared: list[str]
    change: Change | None = None


def export(
    saved: Saved,
    out: str | Path,
    *,
    prune_below: float | None = None,
    one_rank: bool = False,
    merge: bool = False,
    base: str | None = None,
    probe: str = RANDOM,
) -> Export:
    """Write a plain LoRA adapter, or the merged model.

    Args:
        saved (`Saved`): what `read_saved` found.
        out (`str` or `Path`): folder to write, new or empty.
        prune_below (`float`, *optional*): drop directions that are open with a probability below it.
        one_rank (`bool`, *optional*, defaults to False): fill all modules up to one rank with zeros, so that `lora_alpha / r` is
            every module's scale.
        merge (`bool`, *optional*, defaults to False): write the base model with the adapter merged into it.
        base (`str`, *optional*): the base model; the one that the adapter's configuration names where omitted.
        probe (`str`, *optional*, defaults to `"random"`): what pruning is measured on: random inputs, a text file, or `"none"`.

    Returns:
        `Export`.

    Raises:
        StructLoRAError: a folder that is not empty, an adapter that cannot be pruned, a base model that cannot be loaded or
            probed. Nothing is written then.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StructLoRAError(f"{out}, which is not empty", "a new or empty folder", "name another, or empty it")
    if merge and saved.lora.layer_replication:
        raise StructLoRAError(
            "`layer_replication`, whose copies of a layer share its weights, in an adapter to merge",
            "adapted weights that only one module uses",
            "export without merging",
        )
    base_name, revision = (base, None) if base else (saved.lora.base_model_name_or_path, saved.lora.revision)
    lora, tensors = saved.lora, saved.tensors
    done = Export([], [])
    # The result is made beside its place, on the same disk, and moved: an error leaves nothing of it.
    near = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    with (
        tempfile.TemporaryDirectory() as scratch,
        tempfile.TemporaryDirectory(prefix=".export-", dir=near) as unfinished,
    ):
        before, after, result = Path(scratch, "before"), Path(scratch, "after"), Path(unfinished, "result")
        if prune_below is not None:
            pruned = prune(saved, prune_below)
            lora, tensors = pruned.lora, pruned.tensors
        if one_rank:
            lora, tensors = with_one_rank(lora, tensors)
        write_adapter(after, lora, tensors)
        if prune_below is not None:
            write_adapter(before, saved.lora, saved.tensors)
            done = Export(_sizes(saved, pruned, before, after), pruned.spared)
            if probe != NO_PROBE:
                done.change = output_change(
                    lambda: load_base(base_name, saved.lora, saved.tensors, revision),
                    before,
                    after,
                    lambda model: _probe(model, base_name, revision, probe),
                )
        if merge:
            model = load_base(base_name, saved.lora, saved.tensors, revision)
            _untie(model, {match["module"] for name in tensors if (match := LORA_NAME.match(name))})
            model = _with_adapter(model, after)
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


def load_base(
    name: str | None, lora: LoraConfig, tensors: dict[str, Tensor], revision: str | None = None
) -> PreTrainedModel:
    """The base model an adapter was trained on, with the head that it was trained with, in the model's own precision.

    Args:
        name (`str`, *optional*): name or path.
        lora (`LoraConfig`): names the head, by its task or the model's class.
        tensors (`dict[str, Tensor]`): of the adapter; where they hold the head, they say how many classes it has.
        revision (`str`, *optional*): branch, tag or commit of the model; the main branch where omitted.

    Raises:
        StructLoRAError: it cannot be loaded.
    """
    if not name:
        raise StructLoRAError("no base model named in adapter_config.json", "its name or path", "give `--base MODEL`")
    with refusing(f"loading the base model {name}", "the model that the adapter was trained on", "give `--base MODEL`"):
        config = AutoConfig.from_pretrained(name, **_at(revision))
        named = (lora.auto_mapping or {}).get("base_model_class") or (config.architectures or [None])[0]
        model_class = _HEADS.get(lora.task_type) or getattr(transformers, named or "", AutoModelForCausalLM)
        classes = _class_count(tensors)
        labels = {"num_labels": classes} if classes else {}
        return model_class.from_pretrained(name, dtype="auto", **labels, **_at(revision))


def _with_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    with refusing(
        "loading the adapter onto the base model",
        "the base model as it was trained on, its vocabulary too",
        "save the base model after `resize_token_embeddings`, and give `--base MODEL`",
        (RuntimeError,),
    ):
        return PeftModel.from_pretrained(base, str(folder)).eval()


def _untie(base: PreTrainedModel, adapted: set[str]) -> None:
    """Give the head a weight of its own where it shares the embeddings' and LoRA adds to either: merged, they differ."""
    head = base.get_output_embeddings()
    if getattr(head, "weight", None) is None:
        return
    embeddings = base.get_input_embeddings()
    tied = {f"{_PREFIX}{name}" for name, module in base.named_modules() if module is embeddings or module is head}
    if head.weight is not embeddings.weight or not tied & adapted:
        return
    if base.config.is_encoder_decoder:  # with more than two uses of the weight; T5 scales by whether it is tied
        raise StructLoRAError(
            f"LoRA on embeddings that {type(base).__name__} shares with its head, in a model to merge",
            "adapted weights that only one module uses",
            "export without merging",
        )
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False


def _at(revision: str | None) -> dict[str, str]:
    return {"revision": revision} if revision else {}


@torch.no_grad()
def output_change(
    load: Callable[[], PreTrainedModel], before: Path, after: Path, probe_of: Callable[[PreTrainedModel], Probe]
) -> Change:
    """Compare two adapters of one model in plain PEFT.

    Args:
        load (callable): gives the model. It is asked anew for each adapter, since some change the model itself
            (`layer_replication`, `bias`).
        before, after (`Path`): folders of the adapters.
        probe_of (callable): model -> what to run it on.

    Raises:
        StructLoRAError: the model gives no logits.
    """
    logits = []
    for folder in (before, after):
        with torch.random.fork_rng():
            torch.manual_seed(0)  # weights that no file holds are drawn at random: the same ones for both
            base = load()
        probe = probe_of(base)
        logits.append(_logits(_with_adapter(base, folder).base_model, probe.inputs))
        del base
    old, new = (part.log_softmax(-1) for part in logits)
    return Change(
        probe.name,
        largest=float((logits[0] - logits[1]).abs().max()),
        divergence=float((old.exp() * (old - new)).sum(-1).mean()),
        agreement=float((old.argmax(-1) == new.argmax(-1)).float().mean()),
    )


def _logits(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """(n, classes), row by row: some classifiers take a batch only where a padding token is known."""
    found = []
    for row in range(len(next(iter(inputs.values())))):
        output = model(**{name: value[row : row + 1] for name, value in inputs.items()})
        if output.get("logits") is None:
            raise StructLoRAError(
                f"no logits in the output of {type(model).__name__}", "a model that predicts", "give `--probe none`"
            )
        found.append(output["logits"].float().flatten(0, -2))
    return torch.cat(found)


def _class_count(tensors: dict[str, Tensor]) -> int | None:
    """Rows of the last layer of a classification head that is saved with the adapter."""
    heads = [name for name in tensors if name.endswith(".weight") and {"classifier", "score"} & set(name.split("."))]
    heads = [name for name in heads if not LORA_NAME.match(name)]
    return len(tensors[max(heads)]) if heads else None


def _probe(base: PreTrainedModel, base_name: str, revision: str | None, given: str) -> Probe:
    if given == RANDOM:
        return _random_probe(base)
    with refusing("reading the probe text", "a text file and the base model's tokenizer", "correct `--probe`"):
        tokenizer = AutoTokenizer.from_pretrained(base_name, **_at(revision))
        ids = tokenizer(Path(given).read_text(encoding="utf-8"))["input_ids"][: _PROBE_ROWS * _PROBE_LENGTH]
    if not ids:
        raise StructLoRAError(f"no text in {given}", "a text of some words", "correct `--probe`")
    return Probe(_of_tokens(base, torch.tensor([ids])), f"1 x {len(ids)} tokens of {given}")


def _random_probe(base: PreTrainedModel) -> Probe:
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    if base.main_input_name == "input_ids":
        settings = base.config.to_dict()
        special = {v for k, v in settings.items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)}
        usable = torch.tensor([i for i in range(base.get_input_embeddings().num_embeddings) if i not in special])
        tokens = usable[torch.randint(len(usable), (_PROBE_ROWS, _PROBE_LENGTH), generator=generator)]
        return Probe(_of_tokens(base, tokens), f"{_PROBE_ROWS} x {_PROBE_LENGTH} random tokens")
    if base.main_input_name == "pixel_values":
        size = base.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.randn(_PROBE_ROWS, base.config.num_channels, height, width, generator=generator)
        return Probe({"pixel_values": pixels.to(base.dtype)}, f"{_PROBE_ROWS} random pictures")
    raise StructLoRAError(
        f"a base model whose input is `{base.main_input_name}`",
        "one of tokens or pictures, to measure pruning on",
        "give `--probe none`",
    )


def _of_tokens(base: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    return {"input_ids": tokens, **({"decoder_input_ids": tokens} if base.config.is_encoder_decoder else {})}


def _sizes(saved: Saved, pruned: Pruned, before: Path, after: Path) -> list[Size]:
    """Directions, parameters and bytes; then the directions of each kind."""
    counts = [
        sum(value.numel() for name, value in tensors.items() if LORA_NAME.match(name))
        for tensors in (saved.tensors, pruned.tensors)
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
    sources = [(str(folder), {}), *([(base_name, _at(revision))] if base_name else [])]
    for source, options in sources:
        for kind in (AutoProcessor, AutoTokenizer):
            try:
                kind.from_pretrained(source, **options).save_pretrained(out)
                return
            except (OSError, ValueError, KeyError):
                continue
