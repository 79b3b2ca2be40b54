"""FSDP2 (`fully_shard`): parameters are DTensors, sharded over ranks, and a torch optimizer steps each rank's shards.

As with one process, latent values are swapped in for `optimizer.step()`; each rank swaps its own shards. On a mesh of two
dimensions (HSDP) groups of ranks hold replicas of the shards, and FSDP2 reduces gradients over both; the map of each
replica is then the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ..core.mapping import Factors
from ..core.nodes import Kind
from ..errors import StructLoRAError
from .packing import Fragment, Packing
from .torch import TorchEngine

_BY_ROWS = ((Shard(0),), (Replicate(), Shard(0)))  # FSDP2's placements, and those of HSDP


class FSDP2Engine(TorchEngine):
    """Args:
        model (`nn.Module`): the model that holds the FSDP modules.
        optimizer (`torch.optim.Optimizer`): steps the sharded parameters.
        kinds (`list[Kind]`): what is trained.

    Raises:
        StructLoRAError: parameters that are not sharded by rows, or over other ranks too (tensor parallelism).
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, kinds: list[Kind]):
        super().__init__(optimizer, kinds, "FSDP2")
        self._parameters = [p for kind in kinds for p in (*kind.A, *kind.B)]
        odd = [p for p in self._parameters if not isinstance(p, DTensor) or tuple(p.placements) not in _BY_ROWS]
        if odd:
            found = odd[0].placements if isinstance(odd[0], DTensor) else "none"
            raise StructLoRAError(
                f"LoRA parameters with placements {found}",
                "FSDP2 sharding of all of them by rows, over a mesh of one dimension, or two (HSDP)",
                "shard the root module, without tensor parallelism",
            )
        self._sharded_modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        mesh = self._parameters[0].device_mesh
        if mesh.ndim == 2:
            self.name = "HSDP"
        self.packing = Packing(kinds, mesh.get_group(mesh.ndim - 1))
        self._finite = True

    def read_gradients(self) -> list[Factors] | None:
        if all(parameter.grad is None for parameter in self._trained):
            return None
        gradients, bad = self.packing.gather_with(self._fragments(lambda p: p.grad), self._bad_gradients())
        self._finite = not bad
        return gradients

    def write_gradients(self, gradients: list[Factors], fill_missing: bool) -> None:
        if fill_missing:
            for parameter in self._trained:
                if parameter.grad is None and parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
        self.packing.scatter(gradients, self._fragments(lambda p: p.grad))

    def write_latents(self, latents: list[Factors]) -> None:
        self._latents = [
            Factors(A.to(k.device).float(), B.to(k.device).float())
            for k, (A, B) in zip(self.kinds, latents, strict=True)
        ]

    def read_working(self) -> list[Factors]:
        return self.packing.gather(self._fragments(lambda p: p.data))

    def stored(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        whole = value.view(parameter.shape).to(parameter.dtype)
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)  # all have it

    def keep_versions(self) -> ExitStack:
        return ExitStack()  # a backward reads gathered copies, which we do not write to

    def _look(self) -> tuple[list[int], Tensor]:
        # Versions alone: every rank sees the same ones, and must, since reading what was written is a collective.
        return [p._version for p in self._trained], torch.zeros(0)

    def gradients_are_finite(self) -> bool:
        return self._finite

    def _put(self, values: list[Factors]) -> None:
        for module in self._sharded_modules:
            module.reshard()  # a forward without backward may have left whole copies, which would go stale
        self.packing.scatter(values, self._fragments(lambda p: p.data))

    def _take(self) -> None:
        self._latents = self.read_working()

    def _fragments(self, of: Callable[[nn.Parameter], DTensor | None]) -> list[Fragment]:
        fragments = []
        for parameter in self._parameters:
            tensor = of(parameter)
            if tensor is not None:
                start = self._first_row(parameter) * math.prod(parameter.shape[1:])
                fragments.append(Fragment(self.packing.offset(parameter) + start, tensor.to_local().view(-1)))
        return fragments

    def _first_row(self, parameter: DTensor) -> int:
        """Rows that the ranks before this one hold: FSDP2 deals them as `torch.chunk` does."""
        mesh, rows = parameter.device_mesh, parameter.shape[0]
        dimension = mesh.ndim - 1
        share = -(-rows // mesh.size(dimension))
        return min(mesh.get_local_rank(dimension) * share, rows)
