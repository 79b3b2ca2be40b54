"""Checks of a training command's arguments: what TRL's script would meet late, or say less plainly."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

from peft.utils import CONFIG_NAME
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..errors import StructLoRAError, refuse_unwritable
from ..state import STATE_NAME
from .arguments import Arguments

_BATCHES = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


def check_arguments(given: Arguments) -> None:
    """Look at model, batches, rewards and output folder; write paths and target modules as TRL takes them.

    Args:
        given (`Arguments`): with `resume_from_checkpoint` as `last_checkpoint` found it.

    Raises:
        StructLoRAError: one of them cannot be used.
    """
    _check_model(given.model)
    for name in _BATCHES:
        if (getattr(given.training, name) or 0) < 1:
            raise StructLoRAError(f"{name}={getattr(given.training, name)}", "1 or more", f"correct `{name}`")
    if given.training.seed is None:
        raise StructLoRAError("`seed` without a value", "a number", "set it, or remove the key")
    script = vars(given.script)
    if "reward_funcs" in script and not (script["reward_funcs"] or script["reward_model_name_or_path"]):
        raise StructLoRAError(
            "neither `reward_funcs` nor `reward_model_name_or_path`",
            "something that judges completions",
            "set `reward_funcs` to names or import paths of functions, or `reward_model_name_or_path` to a model",
        )
    output = Path(given.training.output_dir)
    refuse_unwritable(output)
    checkpoint = given.training.resume_from_checkpoint
    has_run = (output / CONFIG_NAME).exists() or whole_checkpoints(output)
    if has_run and not given.overwrite and not checkpoint:
        raise StructLoRAError(
            f"an adapter or checkpoints of an earlier run in output_dir={output}",
            "a new folder, so that nothing is lost",
            "choose another `output_dir`; or give `--resume_from_checkpoint true` to continue that run, or `--overwrite`",
        )
    # The other way round the callback refuses. Its optimizer's moments are of latent factors, not of the adapter.
    if checkpoint and given.structlora is None and (Path(checkpoint) / STATE_NAME).is_file():
        raise StructLoRAError(
            f"a checkpoint that StructLoRA wrote in {checkpoint}, and structlora=false",
            "a checkpoint of plain LoRA",
            "resume without `structlora: false`, or choose another `output_dir` for a run of plain LoRA",
        )


def _check_model(model) -> None:
    if not isinstance(model.model_name_or_path, str) or not model.model_name_or_path:
        raise StructLoRAError(
            f"`model_name_or_path` of {model.model_name_or_path!r}",
            "a model to adapt",
            "set it to a folder or to a model of the hub",
        )
    path = os.path.expanduser(model.model_name_or_path)
    if path.startswith((".", "/")):
        if not os.path.isdir(path):
            raise StructLoRAError(f"no folder {path}", "a model to adapt", "correct `model_name_or_path`")
        if os.path.isfile(f"{path}/{CONFIG_NAME}") and not os.path.isfile(f"{path}/config.json"):
            raise StructLoRAError(
                f"an adapter in {path}",
                "a whole model, to which a new adapter is added",
                f"merge it (`structlora export {path} MERGED --merge`) and train on MERGED; or continue its run with "
                "`resume_from_checkpoint`",
            )
        model.model_name_or_path = path
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


def whole_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a folder that were written to their end, the oldest first."""
    found = (file.parent for file in output.glob(f"checkpoint-*/{TRAINER_STATE_NAME}"))  # written last
    found = [path for path in found if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def last_checkpoint(training: TrainingArguments) -> str | None:
    """The checkpoint that `resume_from_checkpoint` asks for: a path, or with 'true' the last whole one of
    `output_dir`; None where the run starts anew.

    Raises:
        StructLoRAError: there is none, or its writing was cut short.
    """
    asked = str(training.resume_from_checkpoint)
    if asked.lower() in ("false", "none", ""):
        return None
    whole = whole_checkpoints(Path(training.output_dir))
    if asked.lower() == "true":
        if whole:
            return str(whole[-1])
        where, remedy = f"in {training.output_dir}", "correct `output_dir`"
    else:
        if (Path(asked) / TRAINER_STATE_NAME).is_file():
            return asked
        where = f"at {asked}"
        remedy = f"set `resume_from_checkpoint: {whole[-1]}`" if whole else "correct the path"
    raise StructLoRAError(
        f"no whole checkpoint {where}",
        f"a folder with {TRAINER_STATE_NAME}, which Trainer writes last",
        f"{remedy}, or remove `resume_from_checkpoint` to start over",
    )
