"""FSDP2 (`fully_shard`): parameters are sharded DTensors, and a torch optimizer steps each rank's shards.

On a mesh of two dimensions (HSDP) groups of ranks hold replicas of the shards, and FSDP2 reduces gradients
over both; the map of each replica is then the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..core.kinds import Kind
from ..errors import StructLoRAError
from .base import Part, copy_values, local
from .torch import TorchEngine

_BY_ROWS = ((Shard(0),), (Replicate(), Shard(0)))  # FSDP2's placements, and those of HSDP


class FSDP2Engine(TorchEngine):
    """FSDP2 and HSDP: a `torch.optim` optimizer that steps sharded parameters.

    Args:
        model (`nn.Module`): the model that holds the FSDP modules.
        optimizer (`torch.optim.Optimizer`): steps the sharded parameters.
        kinds (`list[Kind]`): what is trained.

    Raises:
        StructLoRAError: parameters that are not sharded by rows, or over other ranks too (tensor
            parallelism).
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, kinds: list[Kind]):
        parameters = [p for kind in kinds for p in kind.parameters]
        odd = [p for p in parameters if not isinstance(p, DTensor) or tuple(p.placements) not in _BY_ROWS]
        if odd:
            found = odd[0].placements if isinstance(odd[0], DTensor) else "none"
            raise StructLoRAError(
                f"LoRA parameters with placements {found}",
                "FSDP2 sharding of all of them by rows, over a mesh of one dimension, or two (HSDP)",
                "shard the root module, without tensor parallelism (`tp_size=1`)",
            )
        mesh = parameters[0].device_mesh
        super().__init__(optimizer, kinds, "HSDP" if mesh.ndim == 2 else "FSDP2")
        self.group = mesh.get_group(mesh.ndim - 1)
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]

    def part(self, parameter: nn.Parameter) -> Part:
        """FSDP2 deals rows as `torch.chunk` does."""
        mesh, rows = parameter.device_mesh, parameter.shape[0]
        dimension, size = mesh.ndim - 1, math.prod(parameter.shape[1:])
        share, rank = -(-rows // mesh.size(dimension)), mesh.get_local_rank(dimension)
        return min(rank * share, rows) * size, min((rank + 1) * share, rows) * size

    def values(self, parameter: nn.Parameter) -> Tensor:
        return local(parameter)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return None if parameter.grad is None else local(parameter.grad)

    def dropped(self, parameters: list[nn.Parameter]) -> list[bool]:
        return [False] * len(parameters)  # while gradients accumulate, they are not in `grad`

    def let_go(self) -> None:
        super().let_go()
        self._modules = []

    @torch.no_grad()
    def write(self, parameters: list[nn.Parameter], whole: Tensor) -> None:
        for module in self._modules:
            module.reshard()  # a forward without backward may have left whole copies, which would go stale
        own = [row[slice(*self.part(p))] for p, row in zip(parameters, whole.flatten(1), strict=True)]
        copy_values([local(p) for p in parameters], own)
