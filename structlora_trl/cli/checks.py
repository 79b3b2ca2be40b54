"""Checks of a training command's arguments: what TRL's script would meet late, or say less plainly."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..errors import StructLoRAError
from ..state import STATE_NAME
from .arguments import Arguments
from .early import is_true, refuse_earlier_run, refuse_missing_model

_BATCHES = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_LISTED = 12  # names of modules in a message


def _above_zero(value) -> bool:
    return 0 < value < math.inf


# Argument -> which values it takes, and the words for them. Other libraries meet these in the middle of a set-up, or not at all.
_NUMBERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "learning_rate": (_above_zero, "a number above 0"),
    "weight_decay": (lambda v: 0 <= v < math.inf, "a number of 0 or more"),
    "lora_r": (_above_zero, "a rank of 1 or more"),
    "lora_alpha": (_above_zero, "a number above 0, since updates are scaled by `lora_alpha / lora_r`"),
    "lora_dropout": (lambda v: 0 <= v < 1, "a probability of 0 or more and below 1"),
    "test_split_size": (lambda v: v is None or 0 < v < 1, "a share of the rows above 0 and below 1"),
}


def check_arguments(command: str, given: Arguments) -> None:
    """Look at model, numbers, rewards and output folder; write paths and target modules as TRL takes them.

    Args:
        command (`str`): the training command.
        given (`Arguments`): with `resume_from_checkpoint` as `last_checkpoint` found it.

    Raises:
        StructLoRAError: one of them cannot be used.
    """
    for name in _BATCHES:
        if (getattr(given.training, name) or 0) < 1:
            raise StructLoRAError(f"{name}={getattr(given.training, name)}", "1 or more", f"correct `{name}`")
    values = {**vars(given.mixture), **vars(given.model), **vars(given.training)}
    for name, (accepts, meaning) in _NUMBERS.items():
        if not accepts(values[name]):
            raise StructLoRAError(f"{name}={values[name]}", meaning, f"correct `{name}`")
    if given.training.max_steps <= 0 and not _above_zero(given.training.num_train_epochs):
        passes = given.training.num_train_epochs
        raise StructLoRAError(
            f"num_train_epochs={passes}", "a number of passes above 0", "correct `num_train_epochs`"
        )
    if given.training.seed is None:
        raise StructLoRAError("`seed` without a value", "a number", "set it, or remove the key")
    script = vars(given.script)
    if "reward_funcs" in script and not (script["reward_funcs"] or script["reward_model_name_or_path"]):
        raise StructLoRAError(
            "neither `reward_funcs` nor `reward_model_name_or_path`",
            "something that judges completions",
            "set `reward_funcs` to names or import paths of functions, or `reward_model_name_or_path` to a model",
        )
    checkpoint = given.training.resume_from_checkpoint
    refuse_earlier_run(Path(given.training.output_dir), checkpoint, is_true(given.overwrite))
    # The other way round the callback refuses. Its optimizer's moments are of latent factors, not of the adapter.
    if checkpoint and given.structlora is None and (Path(checkpoint) / STATE_NAME).is_file():
        raise StructLoRAError(
            f"a checkpoint that StructLoRA wrote in {checkpoint}, and structlora=false",
            "a checkpoint of plain LoRA",
            "resume without `structlora: false`, or choose another `output_dir` for a run of plain LoRA",
        )
    _check_model(command, given)


def _check_model(command: str, given: Arguments) -> None:
    model = given.model
    if not isinstance(model.model_name_or_path, str) or not model.model_name_or_path:
        raise StructLoRAError(
            f"`model_name_or_path` of {model.model_name_or_path!r}",
            "a model to adapt",
            "set it to a folder or to a model of the hub",
        )
    model.model_name_or_path = refuse_missing_model(model.model_name_or_path)
    if not model.use_peft:
        raise StructLoRAError(
            "use_peft=False in the arguments",
            "LoRA, which StructLoRA trains (and plain LoRA with `structlora: false`)",
            "remove `use_peft`",
        )
    if isinstance(model.lora_target_modules, str) and re.fullmatch(r"[\w.]+", model.lora_target_modules):
        # TRL makes a list of one name a string, which PEFT takes as a pattern.
        model.lora_target_modules = [model.lora_target_modules]
    if (model.load_in_4bit or model.load_in_8bit) and find_spec("bitsandbytes") is None:
        raise StructLoRAError(
            f"load_in_{4 if model.load_in_4bit else 8}bit without the package bitsandbytes",
            "bitsandbytes, which quantises the base model",
            "`pip install bitsandbytes`",
        )
    _check_targets(model, modules(command, _config_of(given)))


def _config_of(given: Arguments) -> PreTrainedConfig:
    """The model's configuration, which the script loads first, too."""
    name = given.model.model_name_or_path
    # Since TRL 1.13 it is of the training arguments.
    trusts = getattr(given.training, "trust_remote_code", getattr(given.model, "trust_remote_code", False))
    try:
        return AutoConfig.from_pretrained(
            name, revision=given.model.model_revision, trust_remote_code=bool(trusts)
        )
    except (OSError, ValueError) as error:
        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        if any(isinstance(cause, GatedRepoError) for cause in causes):
            found = (
                f"a model of the hub for which a licence is to be accepted first, model_name_or_path={name!r}"
            )
            remedy = f"accept it at https://huggingface.co/{name}, and log in: `hf auth login`"
        elif any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
            found = f"no folder {name} here and no model of this name on the hub, model_name_or_path={name!r}"
            remedy = "correct `model_name_or_path`; for a private model, log in: `hf auth login`"
        elif not Path(name).is_dir() and isinstance(error, OSError):
            found = f"no folder {name} here, and a hub that cannot be reached, model_name_or_path={name!r}"
            remedy = (
                "correct `model_name_or_path` (a folder begins with `./` or `/`), or connect to the hub; "
                f"`hf download {name}` fetches it for runs without a network"
            )
        else:
            found = f"a model that cannot be read, model_name_or_path={name!r}"
            remedy = "correct `model_name_or_path`, or the files of the model"
        message = " ".join(str(causes[-1]).split()).rstrip(".")
        raise StructLoRAError(
            f"{found} ({type(causes[-1]).__name__}: {message})",
            "a folder with a model, or a model of the hub that can be reached",
            remedy,
        ) from error


def modules(command: str, config: PreTrainedConfig) -> dict[str, torch.nn.Module]:
    """The modules of a model by name, without its weights; empty for a model that Transformers has no class for."""
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    try:
        with torch.device("meta"):
            if command == "reward":
                return dict(AutoModelForSequenceClassification.from_config(config).named_modules())
            return {} if architecture is None else dict(architecture(config).named_modules())
    except Exception:  # this is for messages alone: what is wrong with the model, the script finds
        return {}


def _check_targets(model, found: dict[str, torch.nn.Module]) -> None:
    """Stop where a target names no module of the model, or no module is as wide as the rank.

    Args:
        model (`trl.ModelConfig`): `lora_target_modules` as PEFT takes them, and `lora_r`.
        found (`dict[str, nn.Module]`): of the model; where it is empty, nothing is known.

    Raises:
        StructLoRAError: it lists the model's linear modules, or names the width.
    """
    widths = {
        name: min(module.weight.shape)
        for name, module in found.items()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    }
    if not widths:
        return
    targets = model.lora_target_modules
    if isinstance(targets, list):
        absent = [t for t in targets if not any(_is_named(name, t) for name in found)]
        chosen = [w for name, w in widths.items() if any(_is_named(name, target) for target in targets)]
    elif targets and targets != "all-linear":  # a pattern
        absent = [] if any(re.fullmatch(targets, name) for name in found) else [targets]
        chosen = [w for name, w in widths.items() if re.fullmatch(targets, name)]
    else:
        absent, chosen = [], [*widths.values()]
    if absent:
        ends = [*dict.fromkeys(name.rpartition(".")[2] for name in widths)]
        listed = ", ".join(ends[:_LISTED]) + (", ..." if len(ends) > _LISTED else "")
        raise StructLoRAError(
            f"lora_target_modules={absent} without a module of that name in {model.model_name_or_path}",
            f"'all-linear', or names of its linear modules: {listed}",
            "correct `lora_target_modules`",
        )
    if chosen and model.lora_r > max(chosen):
        raise StructLoRAError(
            f"lora_r={model.lora_r}, above the width of every adapted module",
            f"at most {max(chosen)}, at which an update can be any matrix",
            "lower `lora_r`",
        )


def _is_named(name: str, target: str) -> bool:
    """As PEFT compares a module's name with an entry of `target_modules`."""
    return name == target or name.endswith(f".{target}")
