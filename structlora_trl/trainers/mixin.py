"""StructLoRA trainers: the callback, built in. `StructLoRAMixin` does the same for any other Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from ..config import StructLoRAConfig
from ..errors import StructLoRAError
from ..yaml_block import read_switch
from .callback import StructLoRACallback
from .compat import run_first


@dataclass
class StructLoRASFTConfig(SFTConfig):
    """TRL's `SFTConfig` with one more field, `structlora`.

    The field attaches nothing by itself: `StructLoRASFTTrainer`, `StructLoRAMixin` and a
    `StructLoRACallback()` without options of its own read it. A bare `SFTTrainer` with these arguments and no
    callback trains plain LoRA.

    Args:
        structlora (`StructLoRAConfig`, `dict`, `bool` or `str`, *optional*, defaults to `True`): Options of
            StructLoRA, True for the defaults, or False for plain LoRA. On the command line, JSON
            (`--structlora '{"beta": 0.5}'`) or a YAML file with a `structlora` key. The field then holds
            a `dict` of the options that differ from the defaults, or False.

    Raises:
        StructLoRAError: an option is unknown or out of range.

    Example:
        >>> arguments = StructLoRASFTConfig(
        ...     folder, structlora={"beta": 0.5}, learning_rate=2e-4, use_cpu=True, bf16=False
        ... )
        >>> arguments.structlora, arguments.learning_rate
        ({'beta': 0.5}, 0.0002)
    """

    structlora: StructLoRAConfig | str | dict | None = field(
        default=True,
        metadata={
            "help": "Options of StructLoRA, as JSON or in a YAML file with a `structlora` key; true for the defaults, false for "
            "plain LoRA."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        config = read_switch(self.structlora)
        # Plain values: trackers and `to_json_string` write them.
        self.structlora = False if config is None else config.changed_options()


class StructLoRAMixin:
    """Put before a Trainer class: `class StructLoRADPOTrainer(StructLoRAMixin, DPOTrainer): pass`.

    Args:
        structlora_config (`StructLoRAConfig` or `dict`, *optional*): where omitted, `args.structlora` if the
            training arguments have it (`StructLoRASFTConfig`), else the defaults. `args.structlora=False`
            trains plain LoRA.
        args, kwargs: those of the Trainer.

    Raises:
        StructLoRAError: the class is written with the mixin behind the Trainer class; an option is unknown or
            out of range.

    Example:
        >>> class MyTrainer(StructLoRAMixin, SFTTrainer):
        ...     pass
        >>> trainer = MyTrainer(
        ...     base,
        ...     args=arguments,
        ...     train_dataset=dataset,
        ...     processing_class=tokenizer,
        ...     peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        ...     structlora_config=StructLoRAConfig(beta=0.5),
        ... )
        >>> any(isinstance(callback, StructLoRACallback) for callback in trainer.callback_handler.callbacks)
        True
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(StructLoRAMixin):
            bases = [base.__name__ for base in cls.__bases__]
            raise StructLoRAError(
                f"class {cls.__name__}({', '.join(bases)}), in which the Trainer comes before StructLoRAMixin",
                "the mixin first: Trainer's constructor calls none that come after it",
                f"write `class {cls.__name__}({', '.join(reversed(bases))})`",
            )

    def __init__(self, *args, structlora_config: StructLoRAConfig | dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if structlora_config is not None or getattr(self.args, "structlora", True) is not False:
            callback = StructLoRACallback(structlora_config)
            self.add_callback(callback)
            run_first(self.callback_handler, callback)


class StructLoRASFTTrainer(StructLoRAMixin, SFTTrainer):
    """TRL's `SFTTrainer`, training StructLoRA. Takes `SFTConfig` or `StructLoRASFTConfig`.

    Example:
        >>> trainer = StructLoRASFTTrainer(
        ...     base,
        ...     args=StructLoRASFTConfig(
        ...         folder, structlora={"beta": 0.5}, bf16=False, use_cpu=True, report_to="none"
        ...     ),
        ...     train_dataset=dataset,
        ...     processing_class=tokenizer,
        ...     peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        ... )
    """
