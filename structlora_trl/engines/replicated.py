"""FSDP2 of the base alone, the adapter whole on each rank: `from_pretrained(distributed_config=...)`.

Transformers shards the base before PEFT adds the adapter, whose parameters stay plain tensors. Trainer
broadcasts them before training and averages their gradients within the backward (transformers issues 48210
and 48873, in 5.24), so that a torch optimizer steps equal parameters with equal gradients on every rank, as
under DDP.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.kinds import Kind
from ..errors import StructLoRAError
from .torch import TorchEngine

_ROUNDING = 1e-5  # of a norm, between processors of several makes


class ReplicatedEngine(TorchEngine):
    """A base that FSDP2 shards, with the adapter whole on every rank.

    Args:
        model (`nn.Module`): the model that holds the FSDP modules.
        optimizer (`torch.optim.Optimizer`): steps the parameters.
        kinds (`list[Kind]`): what is trained.

    Raises:
        StructLoRAError: an adapter that is narrower than its base; at the first step, ranks whose parameters
            or gradients differ.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, kinds: list[Kind]):
        _refuse_narrow(model)
        super().__init__(optimizer, kinds, "FSDP2 (replicated adapter)")
        self._ranks_agree = False

    def agreed(self, flags: Tensor) -> Tensor:
        # Of other trained parameters a rank may hold shards, with NaN that the others do not see.
        if self._ranks_agree:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
            return flags
        norms = torch.stack(
            [_norm(self._trained), _norm([p.grad for p in self._trained if p.grad is not None])]
        )
        extremes = torch.cat([flags, norms, -norms])
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        parameters, gradients, *smallest = extremes[len(flags) :].unbind()
        if not extremes[0]:
            _refuse_differing("parameters", parameters, -smallest[0])
            _refuse_differing("gradients", gradients, -smallest[1])
            self._ranks_agree = True
        return extremes[: len(flags)]


def _norm(tensors: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(tensors, 2, torch.float32)
    return torch.stack([norm.to(tensors[0].device) for norm in norms]).norm()


def _refuse_differing(what: str, largest: Tensor, smallest: Tensor) -> None:
    if largest - smallest > _ROUNDING * largest:
        raise StructLoRAError(
            f"LoRA {what} that differ between ranks, beside a base that FSDP2 shards",
            "the same on every rank: parameters broadcast before training, gradients averaged before each step",
            "train with Trainer of transformers >= 5.24, which does both; in a loop of your own, `dist.broadcast` each LoRA "
            "parameter before `attach`, and `dist.all_reduce` its gradient (`dist.ReduceOp.AVG`) before clipping and "
            "`optimizer.step()`",
        )


def _refuse_narrow(model: nn.Module) -> None:
    """Stop where PEFT took a shard of a weight for the whole, as PEFT 0.21 does with replicas (HSDP)."""
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if not isinstance(base, nn.Linear):
            continue
        for rows in (factor.weight.shape[0] for factor in getattr(module, "lora_B", {}).values()):
            if rows != base.out_features:
                raise StructLoRAError(
                    f"a lora_B of {rows} rows on a module of {base.out_features} outputs ({name}), since PEFT took a shard of its "
                    "weight for the whole",
                    "an adapter as wide as its base; without it, plain LoRA's forward fails too",
                    "with PEFT >= 0.21, load the model with `dp_replicate_size=1`; or have accelerate shard it, with replicas too "
                    "(`fsdp_version: 2`, and `ParallelismConfig(dp_replicate_size=2, dp_shard_size=4)`)",
                )
