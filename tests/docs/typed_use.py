"""What a type checker sees of the public API. Checked by mypy, never run."""

from __future__ import annotations

from pathlib import Path

import torch
from typing_extensions import assert_type

from structlora_trl import (
    Runtime,
    StructLoRACallback,
    StructLoRAConfig,
    StructLoRAError,
    StructLoRAMixin,
    StructLoRASFTConfig,
    StructLoRASFTTrainer,
    attach,
    load_state,
    save_gates,
    save_state,
)


def loop(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    runtime = attach(
        model, optimizer, StructLoRAConfig(beta=0.5), examples=64, batch_size=8, coordinator="gcn"
    )
    assert_type(runtime, Runtime)
    assert_type(runtime.metrics(), dict[str, float])
    assert_type(runtime.state_dict(), dict[str, torch.Tensor])
    assert_type(save_state(runtime, "folder"), Path)
    assert_type(save_gates(runtime, "folder"), Path | None)
    assert_type(runtime.openness(), dict[str, torch.Tensor])
    load_state(runtime, Path("folder"))
    runtime.detach()


def callback() -> None:
    assert_type(StructLoRACallback({"beta": 0.5}, gates="gumbel").runtime, Runtime | None)
    assert_type(StructLoRAConfig().beta, float)
    assert_type(StructLoRAConfig.build({"beta": 0.5}), StructLoRAConfig)
    assert_type(StructLoRAError("a", "b", "c").remedy, str)
    assert issubclass(StructLoRASFTTrainer, StructLoRAMixin) and StructLoRASFTConfig(
        "folder", structlora={"beta": 0.5}
    )
    attach(torch.nn.Linear(1, 1), None)  # type: ignore[arg-type]
    save_state("a runtime", "folder")  # type: ignore[arg-type]
