"""The training commands: TRL's script of the same name, with StructLoRA's callback on its trainer."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

from transformers import TrainerCallback, set_seed
from transformers.trainer import DEFAULT_CALLBACKS, TRAINER_STATE_NAME

from ..errors import refusing
from ..model_card import CARD_NAME, undescribe
from ..shrink.inspecting import COMMAND_FACTS
from ..state import STATE_NAME, save_state
from ..trainers import compat
from ..trainers.callback import StructLoRACallback
from ..trainers.console import end_lines, plain_start_lines
from . import data
from .arguments import Arguments, parse
from .checks import check_arguments
from .early import last_checkpoint, whole_checkpoints
from .launch import launch
from .main import INTERRUPTED


class _Around(TrainerCallback):
    """What a command says and does around TRL's script: where training begins, and beside its adapter.

    Args:
        given (`Arguments`): the command's arguments.
        callback (`StructLoRACallback` or None): the trainer's; None in a run of plain LoRA.
        setting_up (`ExitStack`): turns other libraries' errors into ours; emptied when training begins.
    """

    def __init__(self, given: Arguments, callback: StructLoRACallback | None, setting_up: ExitStack):
        self.given, self.callback, self._setting_up = given, callback, setting_up

    def on_train_begin(self, args, state, control, **kwargs):
        self._setting_up.pop_all()
        if self.given.overwrite and not args.resume_from_checkpoint and state.is_world_process_zero:
            # They would pass for this run's, and are of later steps than its first ones.
            for earlier in whole_checkpoints(Path(args.output_dir)):
                shutil.rmtree(earlier)
        # Into every `trainer_state.json`, from where the report page takes what neither adapter nor log says.
        read = data.sources(self.given.script, self.given.mixture)
        facts = {"data": read, "learning_rate": args.learning_rate}
        # For `structlora export`, which measures on the rows that the run held out.
        facts |= {
            "max_length": getattr(args, "max_length", None),
            "held_out": data.held_out(self.given.script, self.given.mixture, args),
        }
        state.stateful_callbacks[COMMAND_FACTS] = {"args": facts, "attributes": {}}
        if not state.is_world_process_zero:
            return
        if self.callback is None:  # which says the same
            trainer, _ = compat.calling_trainer()
            model = trainer.accelerator.unwrap_model(trainer.model)
            print(plain_start_lines(trainer, model))
        if self.given.training.resume_from_checkpoint:
            print(f"Continuing from {self.given.training.resume_from_checkpoint}.")
        sys.stdout.flush()

    def on_train_end(self, args, state, control, **kwargs):
        """Before the script saves the adapter, and perhaps pushes the folder."""
        output = Path(args.output_dir)
        if state.is_world_process_zero and self.callback is None:
            trainer, _ = compat.calling_trainer()
            model, following = trainer.accelerator.unwrap_model(trainer.model), [["inspect", str(output)]]
            print(end_lines("LoRA", trainer, model, following), flush=True)
        if state.is_world_process_zero:
            output.mkdir(parents=True, exist_ok=True)
            state.save_to_json(str(output / TRAINER_STATE_NAME))
            if self.callback is None:  # what a run of the other kind left there
                (output / STATE_NAME).unlink(missing_ok=True)
            if self.callback is None or self.callback.runtime.is_off:
                undescribe(output / CARD_NAME)
        if self.callback is not None and (self.callback.runtime.is_sharded or state.is_world_process_zero):
            save_state(self.callback.runtime, output)


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
    checkpoint = given.training.resume_from_checkpoint = last_checkpoint(
        given.training.resume_from_checkpoint, given.training.output_dir
    )
    check_arguments(command, given)
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
                    "correct what the message is about: an argument, the columns or cells of the data, or the model's folder",
                    also=(AttributeError,),  # of `reward_funcs`
                )
            )
            DEFAULT_CALLBACKS.extend(
                [*([callback] if callback else []), _Around(given, callback, setting_up)]
            )
            script.main(given.script, given.training, given.model, given.mixture)
    except KeyboardInterrupt:
        if _is_first_process():
            print(_how_to_go_on(command, arguments, given.training.output_dir), file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    finally:
        DEFAULT_CALLBACKS[:] = before


def _how_to_go_on(command: str, arguments: list[str], output: str) -> str:
    again = ["structlora", command, *arguments]
    whole = whole_checkpoints(Path(output))
    if not whole:
        return (
            "\nInterrupted before the first checkpoint (`save_strategy` and `save_steps` say when it comes).\nStart over with: "
            + (shlex.join(again))
        )
    again += ["--resume_from_checkpoint", "true"]  # over another that stands before it
    return f"\nInterrupted; the last checkpoint is {whole[-1]}.\nContinue with: {shlex.join(again)}"


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
