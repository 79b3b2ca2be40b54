"""FSDP2 (`fully_shard`): parameters are sharded DTensors, and a torch optimizer steps each rank's shards.

As with one process, latent values are swapped in for `optimizer.step()`; each rank swaps its own shards. The
shards of lora_B are slices of its width already; those of lora_A hold whole rows, and are moved where the map
acts on them. On a mesh of two dimensions (HSDP) groups of ranks hold replicas of the shards, and FSDP2
reduces gradients over both; the map of each replica is then the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..core.kinds import Factors, Kind
from ..errors import StructLoRAError
from .base import copies_of, copy_values
from .sharded import ShardedEngine
from .slicing import Exchange
from .torch import TorchEngine

_BY_ROWS = ((Shard(0),), (Replicate(), Shard(0)))  # FSDP2's placements, and those of HSDP


class FSDP2Engine(ShardedEngine, TorchEngine):
    """FSDP2 and HSDP: a `torch.optim` optimizer that steps sharded parameters.

    Args:
        model (`nn.Module`): the model that holds the FSDP modules.
        optimizer (`torch.optim.Optimizer`): steps the sharded parameters.
        kinds (`list[Kind]`): what is trained.

    Raises:
        StructLoRAError: parameters that are not sharded by rows, or over other ranks too (tensor
            parallelism).
    """

    keeps_gradients = False  # where gradients are not yet reduced

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, kinds: list[Kind]):
        TorchEngine.__init__(self, optimizer, kinds, "FSDP2")
        parameters = [p for kind in kinds for p in kind.parameters]
        odd = [p for p in parameters if not isinstance(p, DTensor) or tuple(p.placements) not in _BY_ROWS]
        if odd:
            found = odd[0].placements if isinstance(odd[0], DTensor) else "none"
            raise StructLoRAError(
                f"LoRA parameters with placements {found}",
                "FSDP2 sharding of all of them by rows, over a mesh of one dimension, or two (HSDP)",
                "shard the root module, without tensor parallelism (`tp_size=1`)",
            )
        self._sharded_modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        mesh = parameters[0].device_mesh
        if mesh.ndim == 2:
            self.name = "HSDP"
        self._shard(kinds, mesh.get_group(mesh.ndim - 1), _span)

    def remove(self) -> None:
        super().remove()
        self._sharded_modules = []

    def read_gradients(self) -> list[Factors] | None:
        if not self._has_gradients():
            return None
        return self._mapped.to_slices(
            lambda p: torch.zeros_like(_local(p)) if p.grad is None else _local(p.grad)
        )

    @torch.no_grad()
    def write_gradients(self, gradients: list[Factors], fill_missing: list[bool]) -> None:
        filled = self._to_fill(fill_missing)
        for parameter in self._trained:
            if parameter.grad is None and id(parameter) in filled:
                parameter.grad = torch.zeros_like(parameter)
        pulled = [(p, value) for p, value in self._mapped.to_fragments(gradients) if p.grad is not None]
        copy_values([_local(p.grad) for p, _ in pulled], [value for _, value in pulled])

    @torch.no_grad()
    def write_latents(self, latents: list[Factors]) -> None:
        self._latents = {p: value.to(p.dtype) for p, value in self._mapped.to_fragments(latents)}
        self._latent_slices = self._mapped.to_slices(self._latents.__getitem__)
        self._put_values(Exchange(self.sharding, self._unmapped).to_fragments(latents))

    def write_working(self, effective: list[Factors]) -> None:
        self._put_values(self._mapped.to_fragments(effective))
        self._note_written()

    def _mapped_values(self) -> list[tuple[nn.Parameter, Tensor]]:
        return [(p, _local(p)) for p in self._mapped.parameters]

    def _swap_in_latents(self) -> None:
        self._put_values(list(self._latents.items()))

    def _take(self) -> None:
        self._latents = self._shards()
        self._latent_slices = self._mapped.to_slices(self._latents.__getitem__)

    @torch.no_grad()
    def _shards(self) -> dict[nn.Parameter, Tensor]:
        """Copies of this rank's shards, flat, of the mapped sides."""
        return dict(copies_of([(p, shard.view(-1)) for p, shard in self._mapped_values()]))

    def _working(self, parameter: nn.Parameter) -> Tensor:
        return _local(parameter)

    _master = _working

    @torch.no_grad()
    def _put_values(self, values: list[tuple[nn.Parameter, Tensor]]) -> None:
        for module in self._sharded_modules:
            module.reshard()  # a forward without backward may have left whole copies, which would go stale
        ours = [(p, value) for p, value in values if id(p) in self._trained_ids]
        copy_values([_local(p) for p, _ in ours], [value for _, value in ours])


@torch.no_grad()  # where autograd is on, DTensor makes a new tensor each time, slowly
def _local(parameter: DTensor) -> Tensor:
    """This rank's shard."""
    return parameter.to_local()


def _span(parameter: DTensor) -> tuple[int, int]:
    """Where this rank's shard begins and ends in the flat parameter: FSDP2 deals rows as `torch.chunk` does."""
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    dimension, size = mesh.ndim - 1, math.prod(parameter.shape[1:])
    share, rank = -(-rows // mesh.size(dimension)), mesh.get_local_rank(dimension)
    return min(rank * share, rows) * size, min((rank + 1) * share, rows) * size
