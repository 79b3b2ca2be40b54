"""The training commands: TRL's scripts, with StructLoRA's callback on the trainer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..errors import StructLoRAError
from ..model_card import CARD_NAME, undescribe
from ..refusing import refusing
from ..state import STATE_NAME, save_state
from ..trainers import compat
from ..trainers.callback import StructLoRACallback
from . import data
from .arguments import Arguments, parse
from .launch import is_started, launch
from .methods import METHODS
from .rewards import reward_functions


def run(command: str, arguments: list[str]) -> None:
    """Train, and save to `output_dir`: the adapter, StructLoRA's state and the trainer's log.

    Args:
        command (`str`): a key of `METHODS`.
        arguments (`list[str]`): the command line after it.

    Raises:
        StructLoRAError: an argument, data, model or set-up that cannot be used; the message says why.
    """
    method, is_worker = METHODS[command], is_started()
    trainer_class, classes = method.load()
    given = parse(method, classes, arguments)
    if given.launcher and not is_worker:
        return launch(given.launcher, [command, *given.without_launcher])
    checkpoint = _checkpoint(given)
    callback = StructLoRACallback(given.structlora) if given.structlora is not None else None
    rewards = {"reward_funcs": reward_functions(given.script)} if method.is_online else {}
    trainer = _trainer(trainer_class, given, callbacks=[callback] if callback else [], **rewards)
    if callback is None:
        trainer.accelerator.print("structlora: false, so this run is plain LoRA.")
    trainer.train(resume_from_checkpoint=checkpoint)

    output = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():  # what a run of the other kind left there; before saving, which may push
        if callback is None:
            (output / STATE_NAME).unlink(missing_ok=True)
        if callback is None or given.structlora.is_off:
            undescribe(output / CARD_NAME)
    trainer.save_model()
    trainer.save_state()
    if callback is not None and (callback.runtime.is_sharded or trainer.is_world_process_zero()):
        save_state(callback.runtime, output)
    hint = "" if callback is None else f" `structlora inspect {output}` looks into it."
    trainer.accelerator.print(f"Saved to {output}: a plain LoRA adapter.{hint}")
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=given.script.dataset_name)
    compat.end_training(trainer)


def _trainer(trainer_class: type, given: Arguments, **more):
    train_rows, evaluation_rows = data.load(
        given.script, given.mixture, given.training.eval_strategy != "no", given.training.seed
    )
    lora = _lora_config(given.model)
    given.training.model_init_kwargs = _loading(given)
    set_seed(given.training.seed)  # of the adapter's start; TRL did this itself only later than 0.24
    with refusing(
        f"setting up the {trainer_class.__name__}",
        "a model, a tokenizer and rows that it can train on",
        "correct the argument it names (`model_name_or_path`, the columns of the data, ...)",
    ):
        trainer = trainer_class(
            model=given.model.model_name_or_path,
            args=given.training,
            train_dataset=train_rows,
            eval_dataset=evaluation_rows,
            peft_config=lora,
            **more,
        )
    if given.script.ignore_bias_buffers:
        buffers = trainer.model.named_buffers()  # as TRL's script does
        trainer.model._ddp_params_and_buffers_to_ignore = [name for name, b in buffers if b.dtype == torch.bool]
    return trainer


def _lora_config(model: ModelConfig):
    if not model.model_name_or_path:
        raise StructLoRAError(
            "no `model_name_or_path`", "a model to adapt", "set it to a folder or to a model of the hub"
        )
    if not model.use_peft:
        raise StructLoRAError(
            "use_peft=False in the arguments",
            "LoRA, which StructLoRA trains (and plain LoRA with `structlora: false`)",
            "remove `use_peft`",
        )
    lora = get_peft_config(model)
    if isinstance(lora.target_modules, str) and lora.target_modules.isidentifier():
        lora.target_modules = {lora.target_modules}  # TRL makes one name a string, which PEFT takes as a pattern
    return lora


def _loading(given: Arguments) -> dict:
    """How the trainer loads the model: TRL's arguments, and what `model_init_kwargs` adds to them."""
    model = given.model
    loading = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "trust_remote_code": compat.trusts_remote_code(given.training, model),
    }
    quantisation = get_quantization_config(model)
    if quantisation is not None:
        loading["quantization_config"] = quantisation
        if not is_deepspeed_zero3_enabled():  # there transformers refuses a device map
            loading["device_map"] = {"": given.training.device}
    return loading | (given.training.model_init_kwargs or {})


def _checkpoint(given: Arguments) -> str | None:
    """The checkpoint to resume from: a path, or with 'true' the last one of `output_dir`."""
    asked, output = given.training.resume_from_checkpoint, given.training.output_dir
    if asked in (None, False) or str(asked).lower() in ("false", "none", ""):
        return None
    if str(asked).lower() == "true":
        found = get_last_checkpoint(output) if Path(output).is_dir() else None
        if found is None:
            raise StructLoRAError(
                f"no checkpoint in {output}",
                "one to resume from",
                "remove `resume_from_checkpoint` to start over, or correct `output_dir`",
            )
        return found
    if not Path(asked).is_dir():
        raise StructLoRAError(
            f"no folder {asked}", "a checkpoint to resume from", "correct `resume_from_checkpoint`, or set it to `true`"
        )
    return str(asked)
