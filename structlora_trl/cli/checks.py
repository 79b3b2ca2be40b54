"""Checks of a training command's arguments: what TRL's script would meet late, or say less plainly."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..errors import StructLoRAError, nearest, refusing
from ..state import STATE_NAME
from .arguments import Arguments
from .early import if_offline, is_true, refuse_earlier_run, refuse_missing_model, refuse_numbers

_LISTED = 12  # names of modules in a message


def check_arguments(command: str, given: Arguments) -> None:
    """Look at model, numbers, rewards and output folder; write paths and target modules as TRL takes them.

    Args:
        command (`str`): the training command.
        given (`Arguments`): with `resume_from_checkpoint` as `last_checkpoint` found it.

    Raises:
        StructLoRAError: one of them cannot be used.
    """
    values = {**vars(given.mixture), **vars(given.model), **vars(given.training)}
    refuse_numbers(values)
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
    if isinstance(model.lora_target_modules, list):  # of a pattern, PEFT says where nothing matches
        _check_targets(model, modules(command, _config_of(given)))


def _config_of(given: Arguments) -> PreTrainedConfig:
    """The model's configuration, which the script loads first, too."""
    name = given.model.model_name_or_path
    # Since TRL 1.13 it is of the training arguments.
    trusts = getattr(given.training, "trust_remote_code", getattr(given.model, "trust_remote_code", False))
    with refusing(
        f"reading the model model_name_or_path={name!r}",
        "a folder with a model, or a model of the hub that can be reached",
        f"correct `model_name_or_path`{nearest(name)} (a folder begins with `./` or `/`); for a private model, or one "
        f"whose licence is to be accepted on its page, log in: `hf auth login`; "
        f"`hf download {name}` fetches it for runs without a network{if_offline(name)}",
    ):
        return AutoConfig.from_pretrained(
            name, revision=given.model.model_revision, trust_remote_code=bool(trusts)
        )


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
    """Stop where a target names no module of the model, which PEFT passes over where another does.

    Args:
        model (`trl.ModelConfig`): `lora_target_modules` as PEFT takes them.
        found (`dict[str, nn.Module]`): of the model; where it is empty, nothing is known.

    Raises:
        StructLoRAError: it lists the model's linear modules.
    """
    absent = [t for t in model.lora_target_modules if not any(f".{n}".endswith(f".{t}") for n in found)]
    if found and absent:
        head = found[""].get_output_embeddings()  # which 'all-linear' leaves out, too
        linear = [n for n, m in found.items() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head]
        ends = [*dict.fromkeys(name.rpartition(".")[2] for name in linear)]
        near = [*dict.fromkeys(near for t in absent for near in difflib.get_close_matches(t, ends, 1))]
        meant = f" (did you mean {', '.join(near)}?)" if near else ""
        raise StructLoRAError(
            f"lora_target_modules={absent} without a module of that name in {model.model_name_or_path}",
            f"'all-linear', or names of its linear modules: {', '.join(ends[:_LISTED])}",
            f"correct `lora_target_modules`{meant}",
        )
