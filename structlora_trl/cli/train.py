"""The training commands: TRL's script of the same name, with StructLoRA's callback on its trainer."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer import DEFAULT_CALLBACKS, TRAINER_STATE_NAME

from ..errors import StructLoRAError, nearest, refusing
from ..model_card import CARD_NAME, undescribe
from ..shrink.inspecting import COMMAND_FACTS
from ..state import STATE_NAME, save_state
from ..trainers import compat
from ..trainers.callback import StructLoRACallback
from ..trainers.console import end_lines, plain_start_lines
from . import data
from .arguments import Arguments, parse
from .early import last_checkpoint, refuse_missing_model, whole_checkpoints
from .launch import launch
from .main import INTERRUPTED


@dataclass(eq=False)
class _Around(TrainerCallback):
    """What a command says and does around TRL's script: where training begins, and beside its adapter.

    Args:
        given (`Arguments`): the command's arguments.
        callback (`StructLoRACallback` or None): the trainer's; None in a run of plain LoRA.
        sources (`list[str]`): names of the data.
        setting_up (`ExitStack`): turns other libraries' errors into ours; emptied when training begins.
    """

    given: Arguments
    callback: StructLoRACallback | None
    sources: list[str]
    setting_up: ExitStack

    def on_train_begin(self, args, state, control, **kwargs):
        self.setting_up.pop_all()
        if self.given.overwrite and not args.resume_from_checkpoint and state.is_world_process_zero:
            # They would pass for this run's, and are of later steps than its first ones.
            for earlier in whole_checkpoints(Path(args.output_dir)):
                shutil.rmtree(earlier)
        # Into every `trainer_state.json`: what the report page cannot know from adapter and log, and for
        # `structlora export`, which measures on the rows that the run held out.
        facts = {
            "data": self.sources,
            "learning_rate": args.learning_rate,
            "max_length": getattr(args, "max_length", None),
            "held_out": data.held_out(self.given.script, self.given.mixture, args),
        }
        state.stateful_callbacks[COMMAND_FACTS] = {"args": facts, "attributes": {}}
        trainer, model = _calling()
        _refuse_absent_targets(model)
        if not state.is_world_process_zero:
            return
        if self.callback is None:  # which says the same
            print(plain_start_lines(trainer, model))
        if args.resume_from_checkpoint:
            print(f"Continuing from {args.resume_from_checkpoint}.")
        sys.stdout.flush()

    def on_train_end(self, args, state, control, **kwargs):
        """Before the script saves the adapter, and perhaps pushes the folder."""
        output = Path(args.output_dir)
        if state.is_world_process_zero:
            output.mkdir(parents=True, exist_ok=True)
            state.save_to_json(str(output / TRAINER_STATE_NAME))
            if self.callback is None:
                tqdm.write(end_lines("LoRA", *_calling(), [["inspect", str(output)]]))  # above the bar
                (output / STATE_NAME).unlink(missing_ok=True)  # of a run of the other kind
            if self.callback is None or self.callback.runtime.is_off:
                undescribe(output / CARD_NAME)
        if self.callback is not None and (self.callback.runtime.is_sharded or state.is_world_process_zero):
            save_state(self.callback.runtime, output)


def _calling() -> tuple[Trainer, PeftModel]:
    """Return the trainer that calls a callback, and its model."""
    trainer, _ = compat.calling_trainer()
    return trainer, trainer.accelerator.unwrap_model(trainer.model)


def run(command: str, arguments: list[str]) -> None:
    """Train, and save to `output_dir`: the adapter, StructLoRA's state and the trainer's log.

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
    # Each launcher sets one of them in the processes that it starts.
    is_started = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if given.launcher and not is_started:
        return launch(given.launcher, [command, *arguments])
    training, model = given.training, given.model
    checkpoint = training.resume_from_checkpoint = last_checkpoint(
        training.resume_from_checkpoint, training.output_dir
    )
    name = model.model_name_or_path = refuse_missing_model(model.model_name_or_path)
    if isinstance(model.lora_target_modules, str) and re.fullmatch(r"[\w.]+", model.lora_target_modules):
        # TRL makes a list of one name a string, which PEFT takes for a pattern.
        model.lora_target_modules = [model.lora_target_modules]
    if not model.use_peft:
        raise StructLoRAError("use_peft=False", "LoRA, with or without StructLoRA", "remove `use_peft`")
    if getattr(given.script, "reward_funcs", True) is None and not given.script.reward_model_name_or_path:
        raise StructLoRAError(
            "neither `reward_funcs` nor `reward_model_name_or_path`",
            "something that judges completions",
            "set `reward_funcs` to names or import paths of functions, or `reward_model_name_or_path` to a model",
        )
    sources = data.sources(given.script, given.mixture)
    data.as_mixture(given.script, given.mixture)
    data.check(command, ", ".join(sources), given.script, given.mixture, training)
    callback = None if given.structlora is None else StructLoRACallback(given.structlora)
    before = list(DEFAULT_CALLBACKS)
    try:
        with ExitStack() as setting_up, compat.resuming(checkpoint):
            # Until training begins, other libraries' errors are about what the user gave.
            setting_up.enter_context(
                refusing(
                    f"setting up TRL's script {command} with {name}",
                    "a model, a tokenizer and rows that it can train on",
                    "correct what the message is about: an argument, the columns or cells of the data, or the model "
                    f"(a folder, or a name on the hub){nearest(name)}",
                    also=(
                        AttributeError,
                    ),  # of `reward_funcs`, and of rows that are streamed and to be split
                )
            )
            set_seed(training.seed)  # of the adapter's start, and of `test_split_size`
            around = _Around(given, callback, sources, setting_up)
            DEFAULT_CALLBACKS.extend([callback, around] if callback else [around])
            script.main(given.script, training, model, given.mixture)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(_how_to_go_on(command, arguments, training.output_dir), file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    finally:
        DEFAULT_CALLBACKS[:] = before


def _refuse_absent_targets(model: PeftModel) -> None:
    """Stop where a target names no module, which PEFT passes over where another one does."""
    targets, found = model.peft_config["default"].target_modules, model.base_model.targeted_module_names
    if isinstance(targets, (list, set)):
        absent = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in found)]
        if absent:
            raise StructLoRAError(
                f"lora_target_modules={absent} without a module of that name in the model",
                f"'all-linear', or names of modules, such as {found[0].rpartition('.')[2]}",
                "correct `lora_target_modules`",
            )


def _how_to_go_on(command: str, arguments: list[str], output: str) -> str:
    again = shlex.join(["structlora", command, *arguments])
    whole = whole_checkpoints(Path(output))
    if whole:  # `true` comes last, and so counts over another value before it
        return (
            f"\nInterrupted; the last checkpoint is {whole[-1]}.\n"
            f"Continue with: {again} --resume_from_checkpoint true"
        )
    return (
        "\nInterrupted before the first checkpoint (`save_strategy` and `save_steps` say when it comes).\n"
        f"Start over with: {again}"
    )
