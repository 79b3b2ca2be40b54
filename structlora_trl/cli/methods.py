"""The training commands: which trainer of TRL each runs, and which dataclasses its arguments are of."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from ..refusing import refusing
from ..trainers import compat


class Method(NamedTuple):
    """A training command, as TRL's script of the same name has it."""

    name: str
    what: str  # for `--help`
    trainer: str
    config: str
    script: str | None = None  # the dataclass of `trl.scripts.<name>`; None: `ScriptArguments`
    lora_task_type: str = "CAUSAL_LM"  # where the file says none; TRL leaves it to the user

    @property
    def is_online(self) -> bool:
        """Whether it trains on completions that reward functions judge."""
        return self.script is not None

    def load(self) -> tuple[type, tuple[type, ...]]:
        """The trainer, and the dataclasses: of the script, the trainer, the model and the data.

        Raises:
            StructLoRAError: this TRL cannot import them.
        """
        with refusing(
            f"importing TRL's {self.trainer}",
            "versions of TRL and transformers that fit together",
            "upgrade TRL: `pip install --upgrade trl`",
        ):
            trainer, config = (compat.from_trl(name) for name in (self.trainer, self.config))
            script = getattr(import_module(f"trl.scripts.{self.name}"), self.script) if self.script else ScriptArguments
        return trainer, (script, config, ModelConfig, DatasetMixtureConfig)


METHODS = {
    method.name: method
    for method in (
        Method("sft", "Supervised fine-tuning", "SFTTrainer", "SFTConfig"),
        Method("dpo", "Direct preference optimisation", "DPOTrainer", "DPOConfig"),
        Method("kto", "Kahneman-Tversky optimisation", "KTOTrainer", "KTOConfig"),
        Method(*("reward", "Reward modelling", "RewardTrainer", "RewardConfig"), lora_task_type="SEQ_CLS"),
        Method(
            *("grpo", "Group relative policy optimisation", "GRPOTrainer", "GRPOConfig"), script="GRPOScriptArguments"
        ),
        Method("rloo", "REINFORCE leave-one-out", "RLOOTrainer", "RLOOConfig", script="RLOOScriptArguments"),
    )
}
