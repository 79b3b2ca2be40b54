"""An adapter on its base model: both are loaded, and factors of its file are put in."""

from __future__ import annotations

import tempfile
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..errors import StructLoRAError, refusing
from .load_adapter import Saved
from .peft_scaling import LORA_NAME, base_is_moved, base_is_moved_for_good, factor_names

# Inputs of the model, of one example: (1, ...) each; with `labels` where there is a loss.
Row = dict[str, Tensor]
# Tasks whose head is not the one that the base model's own configuration names. (Causal language models keep
# theirs: models of pictures and text have the same task type.)
HEADS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
# What models call the head of a classifier; those of BART's kind and of XLNet's come last.
_HEADS_OF_CLASSES = {"classifier", "score", "classification_head", "logits_proj"}


def load_base(
    name: str | None,
    lora: LoraConfig,
    tensors: dict[str, Tensor],
    revision: str | None = None,
    device_map: str | None = None,
) -> PreTrainedModel:
    """The base model of an adapter, with the head that it was trained with, in the model's own precision.

    Args:
        name (`str`, *optional*): name or path.
        lora (`LoraConfig`): names the head, by its task or the model's class.
        tensors (`dict[str, Tensor]`): of the adapter; where they hold the head, they say how many classes it
            has.
        revision (`str`, *optional*): branch, tag or commit of the model; the main branch where omitted.
        device_map (`str`, *optional*): where to load it, as `from_pretrained` takes it; the CPU where
            omitted.

    Raises:
        StructLoRAError: it cannot be loaded.
    """
    expected, remedy = "the model that the adapter was trained on", "give `--base MODEL`"
    with refusing(f"loading the base model {name}", expected, remedy, (RuntimeError,)):
        config = AutoConfig.from_pretrained(name, **at_revision(revision))
        named = (lora.auto_mapping or {}).get("base_model_class") or (config.architectures or [""])[0]
        model_class = getattr(transformers, HEADS.get(lora.task_type, named), AutoModelForCausalLM)
        classes = class_count(tensors)
        # The adapter brings the head: the model's own may be of another number of classes.
        labels = {"num_labels": classes, "ignore_mismatched_sizes": True} if classes else {}
        options = {"dtype": "auto", "device_map": device_map, **labels, **at_revision(revision)}
        return model_class.from_pretrained(name, **options)


def with_base(saved: Saved, base: str | None) -> tuple[Saved, str | None, str | None]:
    """An adapter as it loads onto its base model, and that model's name and revision.

    Args:
        saved (`Saved`): the adapter.
        base (`str`, *optional*): the model to take in place of the one that the adapter's configuration names.

    Raises:
        StructLoRAError: the run changed the base model when it began, PEFT does not repeat this, and `base`
            is not given.
    """
    lora = saved.lora
    if base_is_moved_for_good(lora) and base in (None, lora.base_model_name_or_path):
        raise StructLoRAError(
            f"an adapter initialised with '{lora.init_lora_weights}', which changed its base model in a way that PEFT does not "
            "repeat",
            "the base model as it was trained on, or an adapter that PEFT has converted",
            "export what `save_pretrained(folder, path_initial_model_for_weight_conversion=INITIAL)` writes, INITIAL being the "
            "adapter before training, saved with `init_lora_weights=True`; or save the changed base "
            "(`model.unload().save_pretrained(BASE)`) and give `--base BASE`",
        )
    name, revision = (base, None) if base else (lora.base_model_name_or_path, lora.revision)
    # The one given is as training left it: nothing more is to be taken out of it.
    if base_is_moved_for_good(lora):
        lora = deepcopy(lora)
        lora.init_lora_weights, lora.base_model_name_or_path, lora.revision = True, name, revision
        saved = replace(saved, lora=lora)
    return saved, name, revision


def base_is_beneath(lora: LoraConfig) -> bool:
    """Whether the model without the adapter is its base model, and not one that the adapter has changed."""
    return lora.bias == "none" and not lora.layer_replication and not base_is_moved(lora)


def on_base(base: PreTrainedModel, lora: LoraConfig, tensors: dict[str, Tensor]) -> PeftModel:
    """A base model with an adapter, as PEFT loads it from its files, in evaluation mode.

    Raises:
        StructLoRAError: they do not fit each other, or PEFT cannot compute LoftQ here.
    """
    for module in base.modules():
        # An evaluation would repack 4-bit weights into a layout that no gradient passes (bitsandbytes 0.50 on CPUs, AVX512-BF16).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), lora, tensors)
        with refusing(
            "loading the adapter onto the base model",
            "the base model as it was trained on; for what LoftQ takes out of the base, an accelerator and bitsandbytes, too",
            "give that model (`--base MODEL`), saved after `resize_token_embeddings` where that was called; for LoftQ without "
            'an accelerator, the base as training had it, and `"init_lora_weights": true` in adapter_config.json',
            # PEFT 0.21 computes LoftQ on accelerators alone; torch without CUDA raises an AssertionError.
            (RuntimeError, AssertionError),
        ):
            return PeftModel.from_pretrained(base, folder).eval()


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


def in_dtype(tensors: dict[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """Factors of a file in another dtype, by its name; as they are where it is None.

    Raises:
        StructLoRAError: a number that is too large for it.
    """
    if dtype is None:
        return tensors
    cast = {name: x.to(getattr(torch, dtype)) if x.is_floating_point() else x for name, x in tensors.items()}
    for name, x in cast.items():
        if not x.isfinite().all():
            raise StructLoRAError(
                f"numbers of '{name}' that {dtype} cannot hold", "finite ones", "try bfloat16"
            )
    return cast


def put(model: PeftModel, tensors: dict[str, Tensor]) -> None:
    """Give a model with one adapter the factors of an adapter file, in place; what else is in it stays.

    Args:
        model (`PeftModel`): with one adapter.
        tensors (`dict[str, Tensor]`): of the file, of the shapes that the model has.

    Raises:
        StructLoRAError: the file names other modules than the model that PEFT makes of it.
    """
    places, names = factors_of(model), factor_names(tensors)
    if places.keys() != names.keys():
        differing = min(places.keys() ^ names.keys())
        found = f"'{differing}' in either the adapter's file or PEFT's model of it"
        raise StructLoRAError(
            found, "it in both", "save the adapter again with this version of PEFT, and export that"
        )
    with torch.no_grad():
        for module, sides in places.items():
            for side, parameter in sides.items():
                parameter.copy_(tensors[names[module][side]])


def factors_of(model: PeftModel) -> dict[str, dict[str, Tensor]]:
    """Module -> "A" or "B" -> that factor, a parameter of a model with one adapter."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        if match := LORA_NAME.match(name):
            found.setdefault(match["module"], {})[match["factor"]] = parameter
    return found


def at_revision(revision: str | None) -> dict[str, str]:
    """Arguments of `from_pretrained` for a branch, tag or commit."""
    return {"revision": revision} if revision else {}


def class_count(tensors: dict[str, Tensor]) -> int | None:
    """Rows of the last layer of a classification head that is saved with the adapter."""
    whole = [name for name in tensors if name.endswith(".weight") and not LORA_NAME.match(name)]
    heads = [name for name in whole if _HEADS_OF_CLASSES & {*name.split(".")}]
    return len(tensors[max(heads)]) if heads else None
