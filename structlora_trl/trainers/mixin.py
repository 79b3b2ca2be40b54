"""StructLoRA trainers: the callback, built in. `StructLoRAMixin` does the same for any other Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import SFTConfig, SFTTrainer

from ..config import StructLoRAConfig
from .callback import StructLoRACallback


@dataclass
class StructLoRASFTConfig(StructLoRAConfig, SFTConfig):
    """TRL's `SFTConfig` with the options of `StructLoRAConfig` beside its own. `seed` serves both.

    They attach nothing by themselves: `StructLoRASFTTrainer`, `StructLoRAMixin` and a `StructLoRACallback()` without options
    of its own read them. A bare `SFTTrainer` with these arguments and no callback trains plain LoRA.

    Example:
        >>> arguments = StructLoRASFTConfig(folder, gate_init=0.8, learning_rate=2e-4, bf16=False, use_cpu=True)
        >>> arguments.gate_init, arguments.learning_rate
        (0.8, 0.0002)
    """

    seed: int = field(default=42, metadata={"help": "Seed of training, the gate noise included."})

    def __post_init__(self):
        StructLoRAConfig.__post_init__(self)
        SFTConfig.__post_init__(self)


class StructLoRAMixin:
    """Put before a Trainer class: `class StructLoRADPOTrainer(StructLoRAMixin, DPOTrainer): pass`.

    Args:
        structlora_config (`StructLoRAConfig` or `dict`, *optional*): where omitted, the options in the training
            arguments if they hold any (`StructLoRASFTConfig`), else the defaults.
        args, kwargs: those of the Trainer.

    Example:
        >>> class MyTrainer(StructLoRAMixin, SFTTrainer):
        ...     pass
        >>> trainer = MyTrainer(
        ...     base,
        ...     args=arguments,
        ...     train_dataset=dataset,
        ...     processing_class=tokenizer,
        ...     peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        ...     structlora_config=StructLoRAConfig(gate_init=0.8),
        ... )
        >>> any(isinstance(callback, StructLoRACallback) for callback in trainer.callback_handler.callbacks)
        True
    """

    def __init__(self, *args, structlora_config: StructLoRAConfig | dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if structlora_config is None and isinstance(self.args, StructLoRAConfig):
            structlora_config = self.args
        self.add_callback(StructLoRACallback(structlora_config))


class StructLoRASFTTrainer(StructLoRAMixin, SFTTrainer):
    """TRL's `SFTTrainer`, training StructLoRA. Takes `SFTConfig` or `StructLoRASFTConfig`.

    Example:
        >>> trainer = StructLoRASFTTrainer(
        ...     base,
        ...     args=StructLoRASFTConfig(folder, gate_init=0.8, bf16=False, use_cpu=True, report_to="none"),
        ...     train_dataset=dataset,
        ...     processing_class=tokenizer,
        ...     peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        ... )
    """
