"""Axolotl: `adapter: structlora`, or a `structlora:` block on `adapter: lora` or `qlora`.

Axolotl 0.21 finds the plugin by its entry point (group `axolotl.plugins`), and so loads it in every job of
the environment: each hook leaves jobs alone that do not ask for it. Axolotl 0.18 to 0.20 need the line
`plugins: [structlora_trl.integrations.axolotl.StructLoRAPlugin]`.

Much of what Axolotl does for LoRA it decides by the names `lora` and `qlora`: quantised loading, gradient
checkpointing, ReLoRA, fused kernels. So `adapter: structlora` becomes one of the two before the configuration
is validated, and all of that works as it does for LoRA.

The fused kernels go around the forward of LoRA modules, in which the gates act, and Axolotl switches them on
by itself. They stay off unless the configuration names them, or says `gates: off`: with the kernels, the modules
that they compute have no gates.
"""

from __future__ import annotations

import logging

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from structlora_trl.config import StructLoRAConfig
from structlora_trl.errors import StructLoRAError
from structlora_trl.yaml_block import read_switch

logger = logging.getLogger(__name__)

NAME = "structlora"
CARRIERS = ("lora", "qlora")  # Axolotl's adapters that are PEFT's LoRA
# Axolotl switches its fused kernels on where all of these are absent.
KERNELS = ("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel")
EMBEDDING_KERNEL = "lora_embedding_kernel"  # of newer versions, beside them


class StructLoRAArgs(BaseModel):
    """The `structlora:` block: pydantic takes its fields from `StructLoRAConfig`."""

    structlora: StructLoRAConfig | bool | None = None

    @field_validator("structlora", mode="before")
    @classmethod
    def _read(cls, value):
        return None if value is None else read_switch(value) or False


class StructLoRAPlugin(BasePlugin):
    """Reads the configuration, and gives the trainer its callback."""

    def __init__(self):
        super().__init__()
        self.callback = None

    def get_input_args(self) -> str:
        return f"{__name__}.StructLoRAArgs"

    def register(self, cfg: dict) -> None:
        """See the configuration as written, before Axolotl validates it: `adapter: structlora` becomes a
        carrier, and fused kernels stay off beside gates.

        Raises:
            StructLoRAError: an unknown option; a block on an adapter that is not LoRA; `structlora: false` on
                `adapter: structlora`.
        """
        self.callback = None
        adapter = cfg.get("adapter")
        if adapter != NAME and NAME not in cfg:
            return
        if adapter == NAME and cfg.get(NAME) is None:
            cfg[NAME] = True
        config = read_switch(cfg[NAME])
        if config is None:
            if adapter == NAME:
                raise StructLoRAError(
                    "`structlora: false` on `adapter: structlora`",
                    "one answer",
                    "write `adapter: lora` for plain LoRA",
                )
            return
        if adapter == NAME:
            cfg["adapter"] = "qlora" if cfg.get("load_in_4bit") else "lora"
        elif adapter not in CARRIERS:
            raise StructLoRAError(
                f"a `structlora:` block on `adapter: {adapter}`",
                "an adapter that is PEFT's LoRA",
                "write `adapter: structlora`, or keep the block with `adapter: lora` or `adapter: qlora`",
            )
        names_kernels = any(cfg.get(key) is not None for key in (*KERNELS, EMBEDDING_KERNEL))
        # With `rl` Axolotl switches no kernels on.
        if config.gates != "off" and not names_kernels and not cfg.get("rl"):
            cfg.update(dict.fromkeys(KERNELS, False))
            logger.warning(
                "StructLoRA leaves Axolotl's fused LoRA kernels off (%s: false): they go around the forward in which gates "
                "act. To train without gates and with the kernels, set `structlora: {gates: off}`.",
                ", ".join(KERNELS),
            )

    def add_callbacks_post_trainer(self, cfg, trainer) -> list:
        if not cfg.get(NAME):
            return []
        from structlora_trl.trainers.callback import StructLoRACallback

        self.callback = StructLoRACallback(cfg[NAME].to_dict())
        if cfg.get("relora"):
            self.callback.refuse_starting_over()
            _follow_restarts(self.callback, trainer)
        return [self.callback]

    def post_train(self, cfg, model) -> None:
        """Refuse to end a run that asked for StructLoRA and trained without it.

        Raises:
            StructLoRAError: Axolotl's trainer never called the callback.
        """
        if cfg.get(NAME) and (self.callback is None or self.callback.runtime is None):
            raise StructLoRAError(
                "a training run that never reached the StructLoRA callback",
                "a trainer that runs its callbacks",
                "train with `rl` and trainer options that use a `transformers.Trainer`",
            )


def _follow_restarts(callback, trainer) -> None:
    """ReLoRA merges the adapter into the base model and resets it: StructLoRA starts over on the fresh
    adapter.
    """
    from axolotl.monkeypatch.relora import ReLoRACallback

    relora = next((c for c in trainer.callback_handler.callbacks if isinstance(c, ReLoRACallback)), None)
    if relora is None:
        return
    restart = relora.on_step_begin

    def on_step_begin(args, state, control, optimizer=None, **kwargs):
        if state.global_step > 0 and state.global_step % relora.jagged_restart_steps == 0:
            callback.start_over(
                trainer, optimizer, lambda: restart(args, state, control, optimizer=optimizer, **kwargs)
            )
        return control

    relora.on_step_begin = on_step_begin
