"""The one line users add: `callbacks=[StructLoRACallback()]`, for any Trainer of Transformers or TRL."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..attachment import build_runtime, find_peft_model, refuse_unreachable
from ..config import StructLoRAConfig
from ..core.mapping import DEFAULT_PARTS, Parts
from ..errors import StructLoRAError
from ..model_card import CARD_NAME, describe_run, undescribe
from ..runtime import Runtime, save_gates
from ..state import STATE_NAME, State, load_state, save_state
from ..yaml_block import read_given, read_switch
from .compat import (
    calling_trainer,
    data_of,
    refuse_engine_taken_down,
    run_first,
    when_train_breaks_off,
    why_quiet,
)
from .console import end_lines, log_briefly, next_commands, start_lines

logger = logging.getLogger(__name__)


class StructLoRACallback(TrainerCallback):
    """Trains the model's LoRA adapter as StructLoRA; checkpoints, resuming and metrics included.

    Between optimizer steps (evaluation, saving, generation) the model holds the adapter, plain LoRA. The model
    may be a PEFT model, or a module that holds one (`peft_module` names it where there are
    several).

    Args:
        config (`StructLoRAConfig`, `dict`, `str` or `Path`, *optional*): options, or a YAML or JSON file that
            has them under the key `structlora`. Where no option is given, `args.structlora` if the training
            arguments have it (`StructLoRASFTConfig`), else the defaults.
        parts (`Parts`, *optional*): gates, graph, coordinator or kinds of your own, for research.
        **overrides: single options, as keywords.

    Raises:
        StructLoRAError: an option is unknown or out of range; later, at the start of training, whatever keeps
            StructLoRA from acting.

    Example:
        >>> trainer = SFTTrainer(
        ...     base,
        ...     args=arguments,
        ...     train_dataset=dataset,
        ...     processing_class=tokenizer,
        ...     peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        ...     callbacks=[StructLoRACallback(beta=0.5)],
        ... )
        >>> result = trainer.train()  # doctest: +ELLIPSIS
        StructLoRA on torch, 1 process: ...
        >>> trainer.save_model(folder)  # a plain LoRA adapter
    """

    def __init__(
        self,
        config: StructLoRAConfig | dict | str | Path | None = None,
        parts: Parts = DEFAULT_PARTS,
        **overrides,
    ):
        self._has_own_options = bool(config or overrides)
        config = read_given(config, "a StructLoRACallback", "the callback")
        self.config = StructLoRAConfig.build(config, **overrides)
        self.parts = parts
        self.runtime: Runtime | None = None
        self._seen_calls = 0
        self._acted_before = 0  # steps in which the runtime acted before this `train()`
        self._had_selected = False  # at the last step
        self._finished: dict | None = (
            None  # the state at the end of the last `train()`, or where it broke off
        )

    def attach(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> Runtime:
        """Build the runtime of a trainer whose model and optimizer are ready.

        Raises:
            StructLoRAError: StructLoRA cannot act on this model and optimizer.
        """
        quiet = why_quiet(trainer)
        has_gates = quiet is None and self.config.gates != "off"
        return build_runtime(
            trainer.model_wrapped,
            optimizer,
            self.config,
            self.parts,
            quiet=quiet,
            steps=trainer.state.max_steps,
            data=data_of(trainer) if has_gates else None,  # which collates rows
        )

    def refuse_starting_over(self) -> None:
        """Stop where the options do not go with `start_over`.

        Raises:
            StructLoRAError: `keep` is set.
        """
        if self.config.keep is not None:
            raise StructLoRAError(
                f"keep={self.config.keep!r} in a run that starts over with fresh adapters (ReLoRA)",
                "one adapter, whose directions are selected once",
                "remove `keep`, or the restarts",
            )

    def start_over(
        self, trainer: Trainer, optimizer: torch.optim.Optimizer, reset: Callable[[], None]
    ) -> None:
        """Train on with a fresh adapter in the same run, as ReLoRA does. Call it between optimizer steps.

        The coordinator starts over: what it learned was about directions that are part of the base by then.
        Counts of steps go on.

        Args:
            reset: merges the adapter and makes it a fresh one.

        Raises:
            StructLoRAError: as `refuse_starting_over`.
        """
        self.refuse_starting_over()
        earlier = self.runtime
        earlier.detach()
        reset()
        self.runtime = self.attach(trainer, optimizer)
        for name in ("step", "skipped_steps", "calls"):
            setattr(self.runtime, name, getattr(earlier, name))

    def on_init_end(self, args, state, control, **kwargs):
        # Attaching may change lora_A: callbacks that copy weights in `on_train_begin` are to come after.
        trainer, _ = calling_trainer()
        run_first(trainer.callback_handler, self)
        when_train_breaks_off(trainer, self._break_off)

    def _break_off(self) -> None:
        """Let go of a model that other code may train next; another `train()` of this Trainer goes on from the state."""
        if self.runtime is not None:
            self.runtime.stop()

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        trainer, resumed_from = calling_trainer()
        refuse_engine_taken_down(trainer)
        _refuse_unannounced_checkpoints(args)
        callbacks = trainer.callback_handler.callbacks
        count = sum(isinstance(callback, StructLoRACallback) for callback in callbacks)
        if count > 1:
            raise StructLoRAError(
                f"{count} StructLoRA callbacks on one trainer",
                "one",
                "remove the others (StructLoRA trainers bring their own)",
            )
        self._take_options(args)
        earlier = callbacks[: callbacks.index(self)]
        run_first(trainer.callback_handler, self)
        if self.runtime is not None and self.runtime.is_attached:  # a `train()` that broke off
            self._finish()
        self.runtime = self.attach(trainer, optimizer)
        if self.runtime.has_aligned:
            _warn_of_earlier(earlier)
        self._seen_calls = 0
        try:
            self._go_on(resumed_from)
            if not self.runtime.has_selected:
                refuse_unreachable(self.config, self.runtime.select_step, state.max_steps)
        except BaseException:
            self.runtime.detach()
            raise
        self._acted_before, self._had_selected = self.runtime.acted_steps, self.runtime.has_selected
        log_briefly(trainer)
        if state.is_world_process_zero:
            name, peft_model = find_peft_model(trainer.model_wrapped, self.config)
            # As Trainer prints its logs: at its default log level, INFO is not shown.
            print(start_lines(self.runtime, trainer, peft_model, name), flush=True)

    def _go_on(self, checkpoint: str | None) -> None:
        """Continue from a checkpoint, or where the last `train()` ended, with steps and a schedule of its own."""
        if checkpoint is not None:
            load_state(self.runtime, checkpoint)
        elif self._finished is not None:
            state = State.parse(self._finished).rewound()
            try:
                self.runtime.restore(state)
            except StructLoRAError as error:
                logger.warning(
                    "StructLoRA starts anew from the weights that stand: it found %s.", error.found
                )

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if not self.runtime.is_attached:
            raise StructLoRAError(
                f"a runtime that is detached, at step {state.global_step} of a run that would go on as plain LoRA",
                "one that stays attached",
                "leave out the call of `detach` or `attach`, or leave StructLoRACallback out",
            )
        if self.runtime.calls == self._seen_calls:
            if not optimizer.step_was_skipped:
                raise StructLoRAError(
                    f"a training step in which {type(optimizer.optimizer).__name__}.step ran no step hooks",
                    "an optimizer that steps through `torch.optim.Optimizer.step`",
                    "choose another `optim`, such as adamw_torch",
                )
            self.runtime.skipped_steps += 1  # GradScaler's or DeepSpeed's doing, who call no hook then
        self._seen_calls = self.runtime.calls
        if self.runtime.has_selected and not self._had_selected:
            # Checkpoints of before hold all directions: the best is chosen among those to come.
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        self._had_selected = self.runtime.has_selected

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.runtime is not None and self.runtime.is_attached and logs is not None and "loss" in logs:
            metrics = self.runtime.metrics()
            logs.update(metrics)
            # The entry of these logs; a Trainer with a `log` of its own may keep none.
            if state.log_history and {"loss", "step"} <= state.log_history[-1].keys():
                state.log_history[-1].update(metrics)

    def on_train_end(self, args, state, control, **kwargs):
        acted = self.runtime.acted_steps > self._acted_before
        if self.runtime.calls and not acted:
            self.runtime.detach()
            raise StructLoRAError(
                f"a run of {self.runtime.calls} optimizer steps, none of which had a gradient of the LoRA weights other than zero",
                "an adapter that the training loss depends on",
                "activate it before training (`model.set_adapter(...)`), leave its `requires_grad` as it is, and check the labels",
            )
        self._take_best(args, state)
        trainer, _ = calling_trainer()
        peft_model = self.runtime.model
        self._finish()
        if state.is_world_process_zero:
            following = next_commands(self.runtime, args.output_dir)
            tqdm.write(end_lines("StructLoRA", trainer, peft_model, following, self.runtime))  # above the bar
            save_gates(self.runtime, args.output_dir)
            card = Path(args.output_dir) / CARD_NAME
            if self.runtime.is_off:
                undescribe(card)
            else:
                describe_run(card, self.runtime, peft_model)

    def _take_best(self, args: TrainingArguments, state: TrainerState) -> None:
        """Follow Trainer to its best checkpoint, whose weights stand in the model by now.

        Raises:
            StructLoRAError: `keep` is set, and the checkpoint is of before the selection.
        """
        if not args.load_best_model_at_end or state.best_model_checkpoint is None:
            return
        if self.config.keep is not None and not self.runtime.has_selected:
            step = self.runtime.select_step
            self._finish()
            raise StructLoRAError(
                f"keep={self.config.keep!r} in a run that ended at step {state.global_step}, before directions are selected at "
                f"step {step}, so that the best checkpoint ({state.best_model_checkpoint}) has them all",
                "a run that goes on after the selection",
                "lower `select_at`, stop later (a longer patience), or remove `keep`; the model has the weights of that checkpoint",
            )
        if (Path(state.best_model_checkpoint) / STATE_NAME).is_file():
            load_state(self.runtime, state.best_model_checkpoint)

    def _finish(self) -> None:
        """Detach, and keep the state, from which another `train()` continues."""
        self.runtime.detach()
        self._finished = self.runtime.state_dict()

    def on_push_begin(self, args, state, control, **kwargs):
        # A checkpoint is uploaded before `on_save`, by one rank, which has no whole state where ranks hold parts.
        if self.runtime is None or not self.runtime.is_attached or self.runtime.is_sharded:
            return
        if (folder := checkpoint_folder(args, state)).is_dir():
            save_state(self.runtime, folder)

    def on_save(self, args, state, control, **kwargs):
        if self.runtime is None or not self.runtime.is_attached:
            return
        # On every rank, before one writes.
        values = self.runtime.state_dict() if self.runtime.is_sharded else None
        if not args.should_save:
            return
        folder = checkpoint_folder(args, state)
        if folder.is_dir():
            save_state(self.runtime, folder, values)
            save_gates(self.runtime, folder)
            if not self.runtime.is_off:
                describe_run(folder / CARD_NAME, self.runtime, self.runtime.model)
        else:
            logger.warning(
                "StructLoRA's state was not saved at step %d: there is no folder %s. To resume from a checkpoint that lies "
                "elsewhere, call `save_state(callback.runtime, folder)` where it is written.",
                state.global_step,
                folder,
            )

    def _take_options(self, arguments) -> None:
        """Read `args.structlora`, where there is one, and refuse options other than the callback's."""
        theirs = read_switch(getattr(arguments, "structlora", True))
        if theirs is None:
            raise StructLoRAError(
                f"`structlora=False` in the training arguments, beside a {type(self).__name__}",
                "one answer",
                "remove the callback to train plain LoRA, or remove `structlora=False`",
            )
        if not self._has_own_options:
            self.config = theirs
            return
        own = self.config.options()
        differ = {name: value for name, value in theirs.changed_options().items() if own[name] != value}
        if differ:
            raise StructLoRAError(
                f"{', '.join(f'{name}={value!r}' for name, value in differ.items())} in the training arguments, and in the "
                f"callback {', '.join(f'{name}={own[name]!r}' for name in differ)}",
                "options in one of the two, or the same in both",
                "give them to the arguments alone (a `StructLoRACallback()`, no `structlora_config`), or use the trainer's "
                "own arguments, such as SFTConfig",
            )


def _refuse_unannounced_checkpoints(args: TrainingArguments) -> None:
    if getattr(args, "enable_jit_checkpoint", False):
        raise StructLoRAError(
            "`enable_jit_checkpoint`, whose checkpoint Trainer writes without a word to callbacks, so that it would lack "
            "StructLoRA's state",
            "checkpoints that a run can go on from",
            "leave it out, and save often (`save_steps`)",
        )


def _warn_of_earlier(callbacks: list[TrainerCallback]) -> None:
    """Name callbacks that ran before lora_A was aligned, and may hold values that no longer stand."""
    looked = [
        type(callback).__name__
        for callback in callbacks
        if type(callback).on_train_begin is not TrainerCallback.on_train_begin
        and not type(callback).__module__.startswith("transformers.")
    ]
    if looked:
        logger.warning(
            "%s ran before StructLoRA, which gives all depths of a fresh adapter the same lora_A: LoRA weights that were "
            "copied there are not those that training starts from. Pass StructLoRACallback in the trainer's `callbacks=`, "
            "or add it first.",
            ", ".join(looked),
        )


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint that a Trainer has just written.

    Trials of a hyperparameter search have folders of their own, whose names only `hp_name` makes public; the
    newest checkpoint of this step is meant otherwise (transformers 5.24;
    `upstream/transformers-save-event-before-rotation.md`).
    """
    output, name = Path(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    if state.trial_name is not None:
        return output / state.trial_name / name
    if state.is_hyper_param_search:
        return max(output.glob(f"*/{name}"), key=lambda folder: folder.stat().st_mtime, default=output / name)
    return output / name
