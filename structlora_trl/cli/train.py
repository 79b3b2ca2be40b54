"""The training commands: TRL's script of the same name, with StructLoRA's callback on its trainer."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from peft.utils import CONFIG_NAME
from transformers import TrainerCallback, set_seed
from transformers.trainer import DEFAULT_CALLBACKS, TRAINER_STATE_NAME

from ..errors import StructLoRAError, refusing
from ..model_card import CARD_NAME, undescribe
from ..state import STATE_NAME, save_state
from ..trainers import compat
from ..trainers.callback import StructLoRACallback
from . import data
from .arguments import Arguments, parse
from .launch import is_started, launch
from .main import INTERRUPTED

_BATCHES = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


class _Around(TrainerCallback):
    """What a command says and does around TRL's script: where training begins, and beside the adapter it saves.

    Args:
        given (`Arguments`): the command's arguments.
        callback (`StructLoRACallback` or None): the trainer's; None in a run of plain LoRA.
        setting_up (`ExitStack`): left when training begins.
    """

    def __init__(self, given: Arguments, callback: StructLoRACallback | None, setting_up: ExitStack):
        self.given, self.callback, self._setting_up = given, callback, setting_up

    def on_train_begin(self, args, state, control, **kwargs):
        self._setting_up.pop_all()
        if state.is_world_process_zero and self.callback is None:
            print("structlora: false, so this run is plain LoRA.", flush=True)
        if state.is_world_process_zero and self.given.training.resume_from_checkpoint:
            print(f"Continuing from {self.given.training.resume_from_checkpoint}.", flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        """Before the script saves the adapter, and perhaps pushes the folder."""
        output = Path(args.output_dir)
        if state.is_world_process_zero:
            output.mkdir(parents=True, exist_ok=True)
            state.save_to_json(str(output / TRAINER_STATE_NAME))
            if self.callback is None:  # what a run of the other kind left there
                (output / STATE_NAME).unlink(missing_ok=True)
            if self.callback is None or self.callback.config.is_off:
                undescribe(output / CARD_NAME)
        if self.callback is not None and (self.callback.runtime.is_sharded or state.is_world_process_zero):
            save_state(self.callback.runtime, output)


def run(command: str, arguments: list[str]) -> None:
    """Train, and save to `output_dir`: the adapter, StructLoRA's state and the trainer's log.

    Args:
        command (`str`): the name of one of TRL's training scripts.
        arguments (`list[str]`): the command line after it.

    Raises:
        StructLoRAError: an argument, data, model or set-up that cannot be used; the message says why.
        SystemExit: after Ctrl-C.
    """
    with refusing(
        f"importing TRL's script {command}",
        "versions of TRL and transformers that fit together",
        "upgrade TRL: `pip install --upgrade trl`",
    ):
        script = compat.trl_script(command)
    given = parse(command, script, arguments)
    if given.launcher and not is_started():
        return launch(given.launcher, [command, *arguments])
    checkpoint = given.training.resume_from_checkpoint = _checkpoint(given)
    _check(given)
    data.as_mixture(given.script, given.mixture)
    data.check(command, given.script, given.mixture, given.training)
    set_seed(given.training.seed)  # of the adapter's start, and of `test_split_size`
    callback = None if given.structlora is None else StructLoRACallback(given.structlora)
    before = list(DEFAULT_CALLBACKS)
    try:
        with ExitStack() as setting_up, compat.resuming(checkpoint):
            # Until training begins, other libraries' errors are about what the user gave.
            setting_up.enter_context(
                refusing(
                    f"setting up TRL's script {command} with {given.model.model_name_or_path}",
                    "a model, a tokenizer and rows that it can train on",
                    "correct the argument it names (`model_name_or_path`, the columns of the data, ...)",
                    also=(AttributeError,),  # of `reward_funcs`
                )
            )
            DEFAULT_CALLBACKS.extend([*([callback] if callback else []), _Around(given, callback, setting_up)])
            script.main(given.script, given.training, given.model, given.mixture)
    except KeyboardInterrupt:
        if _is_first_process():
            print(_how_to_go_on(command, arguments, given.training.output_dir), file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    finally:
        DEFAULT_CALLBACKS[:] = before
    if _is_first_process():
        hint = shlex.join(["structlora", "inspect", given.training.output_dir])
        print("The adapter is plain LoRA." + (f" `{hint}` looks into it." if callback else ""))


def _check(given: Arguments) -> None:
    """Stop at what a script would meet late, or would put in words of its own."""
    model, training, output = given.model, given.training, Path(given.training.output_dir)
    if not model.model_name_or_path:
        raise StructLoRAError(
            "no `model_name_or_path`", "a model to adapt", "set it to a folder or to a model of the hub"
        )
    path = os.path.expanduser(model.model_name_or_path)
    if path.startswith((".", "/")):
        if not os.path.isdir(path):
            raise StructLoRAError(f"no folder {path}", "a model to adapt", "correct `model_name_or_path`")
        model.model_name_or_path = path
    if not model.use_peft:
        raise StructLoRAError(
            "use_peft=False in the arguments",
            "LoRA, which StructLoRA trains (and plain LoRA with `structlora: false`)",
            "remove `use_peft`",
        )
    if isinstance(model.lora_target_modules, str) and model.lora_target_modules.isidentifier():
        # TRL makes a list of one name a string, which PEFT takes as a pattern.
        model.lora_target_modules = [model.lora_target_modules]
    if (model.load_in_4bit or model.load_in_8bit) and find_spec("bitsandbytes") is None:
        raise StructLoRAError(
            f"load_in_{4 if model.load_in_4bit else 8}bit without the package bitsandbytes",
            "bitsandbytes, which quantises the base model",
            "`pip install bitsandbytes`",
        )
    for name in _BATCHES:
        if getattr(training, name) < 1:
            raise StructLoRAError(f"{name}={getattr(training, name)}", "1 or more", f"correct `{name}`")
    if "reward_funcs" in vars(given.script) and not (
        given.script.reward_funcs or given.script.reward_model_name_or_path
    ):
        raise StructLoRAError(
            "neither `reward_funcs` nor `reward_model_name_or_path`",
            "something that judges completions",
            "set `reward_funcs` to names or import paths of functions, or `reward_model_name_or_path` to a model",
        )
    if output.exists() and not output.is_dir():
        raise StructLoRAError(f"output_dir={output}, which is a file", "a folder to write to", "correct `output_dir`")
    if (output / CONFIG_NAME).exists() and not given.overwrite and not training.resume_from_checkpoint:
        raise StructLoRAError(
            f"a finished adapter in output_dir={output}",
            "a new folder, so that nothing is lost",
            "choose another `output_dir`, or give `--overwrite`; `--resume_from_checkpoint true` continues a run",
        )


def _checkpoints(output: str) -> list[Path]:
    """The checkpoints in a folder, the oldest first."""
    found = [path for path in Path(output).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _is_whole(checkpoint: Path) -> bool:
    return (checkpoint / TRAINER_STATE_NAME).is_file()  # which Trainer writes last


def _checkpoint(given: Arguments) -> str | None:
    """The checkpoint to resume from: a path, or with 'true' the last one of `output_dir`."""
    asked, output = str(given.training.resume_from_checkpoint), given.training.output_dir
    if asked.lower() in ("false", "none", ""):
        return None
    found = _checkpoints(output)
    if asked.lower() == "true" and not found:
        raise StructLoRAError(
            f"no checkpoint in {output}",
            "one to resume from",
            "remove `resume_from_checkpoint` to start over, or correct `output_dir`",
        )
    checkpoint = found[-1] if asked.lower() == "true" else Path(asked)
    if not checkpoint.is_dir():
        raise StructLoRAError(
            f"no folder {asked}", "a checkpoint to resume from", "correct `resume_from_checkpoint`, or set it to `true`"
        )
    if not _is_whole(checkpoint):
        whole = [path for path in _checkpoints(str(checkpoint.parent)) if _is_whole(path)]
        remedy = f"set `resume_from_checkpoint: {whole[-1]}`" if whole else "remove `resume_from_checkpoint`"
        raise StructLoRAError(
            f"no {TRAINER_STATE_NAME} in {checkpoint}, so that its writing was cut short",
            "a whole checkpoint",
            f"{remedy}, and delete that folder",
        )
    return str(checkpoint)


def _how_to_go_on(command: str, arguments: list[str], output: str) -> str:
    again = ["structlora", command, *arguments]
    whole = [path for path in _checkpoints(output) if _is_whole(path)]
    if not whole:
        return "\nInterrupted before the first checkpoint (`save_steps` says when it comes).\nStart over with: " + (
            shlex.join(again)
        )
    if "--resume_from_checkpoint" not in arguments:
        again += ["--resume_from_checkpoint", "true"]
    return f"\nInterrupted; the last checkpoint is {whole[-1]}.\nContinue with: {shlex.join(again)}"


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
