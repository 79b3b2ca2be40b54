"""The one line users add: `callbacks=[StructLoRACallback()]`, for any Trainer of Transformers or TRL."""

from __future__ import annotations

from inspect import signature

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..attachment import build_runtime
from ..config import StructLoRAConfig
from ..core.kinds import Factors
from ..core.mapping import DEFAULT_PARTS, Parts
from ..errors import StructLoRAError
from ..model_card import describe_trainer
from ..runtime import Runtime
from ..state import load_state, save_state
from .compat import (
    before_checkpoints,
    callback_being_restored,
    checkpoint_being_saved,
    refuse_engine_taken_down,
    run_first,
    training_trainer,
    why_quiet,
)


class StructLoRACallback(TrainerCallback, ExportableState):
    """Trains the model's LoRA adapter as StructLoRA; checkpoints, resuming and metrics included.

    Between optimizer steps (evaluation, saving, generation) the model holds deterministic evaluation weights.

    Args:
        config (`StructLoRAConfig` or `dict`, *optional*): where no option is given, those in the training arguments if they
            hold any (`StructLoRASFTConfig`), else the defaults.
        parts (`Parts`, *optional*): filter, graph, coordinator, noise or kinds of your own, for research.
        **overrides: single options, as keywords.

    Raises:
        StructLoRAError: an option is unknown or out of range; later, at the start of training, whatever keeps StructLoRA
            from acting.

    Example:
        >>> trainer = SFTTrainer(
        ...     base,
        ...     args=arguments,
        ...     train_dataset=dataset,
        ...     processing_class=tokenizer,
        ...     peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        ...     callbacks=[StructLoRACallback(gate_init=0.8)],
        ... )
        >>> result = trainer.train()  # doctest: +ELLIPSIS
        StructLoRA on torch, 1 process: ...
        >>> trainer.save_model(folder)  # a plain LoRA adapter
    """

    def __init__(self, config: StructLoRAConfig | dict | None = None, parts: Parts = DEFAULT_PARTS, **overrides):
        restored = callback_being_restored()
        is_restored = type(restored) is type(self)
        if is_restored:
            # One state for both: whoever holds the first one finds the runtime in it, and its parts stay.
            self.__dict__ = restored.__dict__
        self.config = StructLoRAConfig.build(config, **overrides)
        self._has_own_options = bool(config or overrides)
        if is_restored:
            return
        self.parts = parts
        self.runtime: Runtime | None = None
        self._seen_hook_calls = 0
        self._acted_before = 0  # steps in which the runtime acted before this `train()`
        # State and weights at the end of the last `train()`.
        self._finished: tuple[dict, list[Factors]] | None = None
        self._state: dict | None = None  # of the checkpoint that is being written, where ranks share the map

    def attach(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> Runtime:
        """The runtime of a trainer whose model and optimizer are ready."""
        seed, quiet = trainer.args.seed, why_quiet(trainer)
        return build_runtime(trainer.model_wrapped, optimizer, self.config, seed, self.parts, quiet)

    def on_init_end(self, args, state, control, **kwargs):
        if args.restore_callback_states_from_checkpoint:
            arguments, constructor = self.state()["args"], signature(type(self))
            try:
                constructor.bind(**arguments)
            except TypeError as error:
                raise StructLoRAError(
                    f"`restore_callback_states_from_checkpoint` beside {type(self).__name__}, which is built with {constructor}",
                    f"a callback that takes what a checkpoint has of it: {', '.join(arguments)}",
                    "leave that argument out (StructLoRA resumes without it), or give the class such a constructor",
                ) from error

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        trainer, resumed_from = training_trainer()
        refuse_engine_taken_down(trainer)
        callbacks = trainer.callback_handler.callbacks
        count = sum(isinstance(callback, StructLoRACallback) for callback in callbacks)
        if count > 1:
            raise StructLoRAError(
                f"{count} StructLoRA callbacks on one trainer",
                "one",
                "remove the others (StructLoRA trainers bring their own)",
            )
        self._take_options(args)
        run_first(trainer.callback_handler, self)
        if self.runtime is not None:
            self.runtime.detach()
        self.runtime = self.attach(trainer, optimizer)
        if self.runtime.is_sharded:
            before_checkpoints(trainer, self._gather_state)
        if not self.config.is_off:
            describe_trainer(trainer, self.config)
        self._seen_hook_calls = 0
        if state.is_world_process_zero:
            print(self.runtime, flush=True)  # as Trainer prints its logs: at its default log level, INFO is not shown
        if resumed_from is not None:
            load_state(self.runtime, resumed_from)
        elif self._finished is not None:
            finished_state, weights = self._finished
            if _equal(weights, self.runtime):
                self.runtime.load_state_dict(finished_state)  # another `train()` continues where the last one ended
        self._acted_before = self.runtime.acted_steps

    def on_step_begin(self, args, state, control, **kwargs):
        self.runtime.train()

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if self.runtime.hook_calls == self._seen_hook_calls and not optimizer.step_was_skipped:
            raise StructLoRAError(
                f"a training step in which {type(optimizer.optimizer).__name__}.step ran no step hooks",
                "an optimizer that steps through `torch.optim.Optimizer.step`",
                "choose another `optim`, such as adamw_torch",
            )
        self._seen_hook_calls = self.runtime.hook_calls
        self.runtime.eval()  # where GradScaler skipped the step, no hook has

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.runtime is not None and self.runtime.is_attached and logs is not None and "loss" in logs:
            metrics = self.runtime.metrics()
            logs.update(metrics)
            # The entry of these logs; a Trainer with a `log` of its own may keep none.
            if state.log_history and {"loss", "step"} <= state.log_history[-1].keys():
                state.log_history[-1].update(metrics)

    def on_train_end(self, args, state, control, **kwargs):
        if self.runtime.hook_calls and self.runtime.acted_steps == self._acted_before:
            self.runtime.detach()
            raise StructLoRAError(
                f"a run of {self.runtime.hook_calls} optimizer steps, none of which had a gradient of the LoRA weights",
                "an adapter that the training loss depends on",
                "activate it before training (`model.set_adapter(...)`), and leave its `requires_grad` as it is",
            )
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            load_state(self.runtime, state.best_model_checkpoint)
        self.runtime.detach()
        self._finished = self.runtime.state_dict(), self.runtime.engine.read_working()

    def state(self) -> dict:
        """Called by Trainer for each checkpoint, before older ones are deleted: our file is written here."""
        directory = checkpoint_being_saved()
        if directory is not None and self.runtime is not None:
            save_state(self.runtime, directory, self._state)
            self._state = None
        return {"args": {"config": self.config.options()}, "attributes": {}}

    def _gather_state(self) -> None:
        """At the start of a checkpoint, on every rank; `state` is called on those that write."""
        if self.runtime.is_attached:
            self._state = self.runtime.state_dict()

    def _take_options(self, arguments) -> None:
        """Those in the training arguments, where they hold any and the callback was given none."""
        if not isinstance(arguments, StructLoRAConfig):
            return
        if not self._has_own_options:
            self.config = StructLoRAConfig.build(arguments)
            return
        own, theirs, defaults = self.config.options(), arguments.options(), StructLoRAConfig().options()
        # An option at its default is taken as not given; `seed` is Trainer's too.
        differ = [n for n in own if n != "seed" and theirs[n] not in (defaults[n], own[n])]
        if differ:
            raise StructLoRAError(
                f"{', '.join(f'{n}={theirs[n]!r}' for n in differ)} in the training arguments, and in the callback "
                f"{', '.join(f'{n}={own[n]!r}' for n in differ)}",
                "options in one of the two, or the same in both",
                "give them to the arguments alone (a `StructLoRACallback()`, no `structlora_config`), or use the trainer's "
                "own arguments, such as SFTConfig",
            )


def _equal(weights: list[Factors], runtime: Runtime) -> bool:
    """Whether these weights stand in a runtime's model, on every rank."""
    now = runtime.engine.read_working()
    same = len(weights) == len(now) and all(
        torch.equal(a, b) for pair in zip(weights, now, strict=True) for a, b in zip(*pair, strict=True)
    )
    return bool(runtime.engine.slices[0].every(torch.tensor(same, device=runtime.kinds[0].device)))
