"""Precisions that people train in: fp32, bf16 and fp16 with a GradScaler."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from tests.support import loops
from tests.support.setups import Setup
from tests.support.tiny import FAMILIES, base_model, peft_model


@dataclass(frozen=True)
class Precision:
    """One precision.

    Args:
        base (`torch.dtype`): of the frozen weights.
        adapter (`torch.dtype`): of the LoRA factors.
        gradients (`float`): largest relative error of gradients.
        autocast (`torch.dtype`, *optional*): what the forward pass is cast to; a GradScaler scales the loss.
    """

    base: torch.dtype
    adapter: torch.dtype
    gradients: float
    autocast: torch.dtype | None = None

    def model(self, family: str, device: str) -> torch.nn.Module:
        """A tiny model under a warm adapter on all its linear modules."""
        model = peft_model(family, "warm", targets=FAMILIES[family].linear, dtype=self.base).to(device)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(self.adapter)
        return model

    def scaler(self, device: str) -> torch.amp.GradScaler | None:
        return torch.amp.GradScaler(device, init_scale=2.0**10) if self.autocast else None

    def setup(self, device: str) -> Setup:
        """The same as a row of set-ups, which can be run, interrupted and resumed."""
        loop = HalfScaling if self.autocast else loops.Loop
        dtype = self.adapter if self.adapter is self.base else None
        return Setup("", base=partial(base_model, "llama", self.base), dtype=dtype, loop=loop).on(device)


class HalfScaling(loops.Scaling):
    """fp16 autocast over an fp16 base and an fp32 adapter, with a GradScaler and clipping."""

    def loss(self, index):
        with torch.autocast(self.device, torch.float16):
            return super().loss(index)


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32, 1e-5),
    "bf16": Precision(torch.bfloat16, torch.bfloat16, 3e-2),
    "fp16 with GradScaler": Precision(torch.float16, torch.float32, 3e-2, autocast=torch.float16),
}
