"""A base that is sharded, with the adapter whole on every rank beside it: FSDP2 as Transformers does it itself.

`from_pretrained(distributed_config=...)` shards the base before PEFT adds the adapter, whose parameters stay plain tensors.
Trainer (transformers issues 48210 and 48873) broadcasts them before training and averages their gradients in the backward, so
that a torch optimizer steps equal parameters with equal gradients on every rank, as under DDP.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..core.kinds import Kind
from ..errors import StructLoRAError
from .torch import TorchEngine

_ROUNDING = 1e-5  # of a norm, on processors of several makes


class ReplicatedEngine(TorchEngine):
    """Args:
        model (`nn.Module`): the model that holds the sharded base.
        optimizer (`torch.optim.Optimizer`): steps the parameters.
        kinds (`list[Kind]`): what is trained.

    Raises:
        StructLoRAError: the adapter is on experts that are divided over ranks; at the first step, ranks whose adapters or
            gradients differ.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, kinds: list[Kind]):
        is_fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
        super().__init__(optimizer, kinds, f"{'FSDP2' if is_fsdp else 'a sharded base'} (replicated adapter)")
        divided = [kind.name for kind in kinds if kind.adapted.experts > 1]
        if divided and any("ep" in _mesh_names(p) for p in model.parameters()):
            raise StructLoRAError(
                f"expert parallelism with LoRA on the experts themselves ({', '.join(divided)})",
                "LoRA on modules that every rank computes with whole, or experts that are not divided over ranks",
                "leave `target_parameters` out, or load the model with `ep_size=1`",
            )
        self._ranks_agree = False

    def bad_gradients(self) -> Tensor:
        # Of other trained parameters a rank may hold shards, and NaN in those that others do not see.
        bad = super().bad_gradients()
        if self._ranks_agree:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
            return bad
        told = torch.stack([bad, *(sign * norm for norm in self._norms() for sign in (1, -1))])
        dist.all_reduce(told, dist.ReduceOp.MAX)
        bad, *extremes = told.unbind()
        if not bad:
            self._refuse_differing(*torch.stack(extremes).tolist())
            self._ranks_agree = True
        return bad

    def _norms(self) -> tuple[Tensor, Tensor]:
        """Of the adapter, and of its gradients."""
        gradients = [p.grad for p in self._trained if p.grad is not None]
        return tuple(
            torch.stack([n.to(self.kinds[0].device) for n in torch._foreach_norm(of, 2, torch.float32)]).norm()
            for of in (self._trained, gradients)
        )

    def _refuse_differing(self, *extremes: float) -> None:
        """`extremes`: the largest norm and the smallest, negated; of the adapter, then of the gradients."""
        for what, largest, smallest in zip(("parameters", "gradients"), extremes[::2], extremes[1::2], strict=True):
            if largest + smallest > _ROUNDING * largest:
                raise StructLoRAError(
                    f"LoRA {what} that differ between ranks, beside a base that is sharded",
                    "the same on every rank: parameters broadcast before training, gradients averaged before the step",
                    "train with Trainer of transformers >= 5.24, which does both; or, in a loop of your own, "
                    "`dist.broadcast` each LoRA parameter before `attach` and `dist.all_reduce` its gradient "
                    "(`dist.ReduceOp.AVG`) before clipping and `optimizer.step()`",
                )


def _mesh_names(parameter: nn.Parameter) -> tuple[str, ...]:
    """Names of the mesh dimensions that a parameter is placed on."""
    return (parameter.device_mesh.mesh_dim_names or ()) if isinstance(parameter, DTensor) else ()
