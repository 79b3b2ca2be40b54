"""Tensor parallelism of Transformers (`tp_plan`): each rank computes with slices of the base's weights.

PEFT (from 0.21 on) slices what touches the sliced side: `lora_B` of modules cut by columns, `lora_A` of
modules cut by rows. These are DTensors, the other factor is whole and equal on all ranks, and so are their
gradients. A torch optimizer steps both, and as with one process, latent values are swapped in for
`optimizer.step()`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ..core.expert_storage import to_nodes
from ..core.kinds import SIDES, Factors, Kind
from ..errors import StructLoRAError
from .torch import TorchEngine


class TensorParallelEngine(TorchEngine):
    """Tensor parallelism of Transformers, where PEFT slices the adapter with the base.

    Args:
        optimizer (`torch.optim.Optimizer`): steps the parameters.
        kinds (`list[Kind]`): what is trained.

    Raises:
        StructLoRAError: another parallelism beside it.
    """

    # Every rank sees the same versions; an error on some ranks would leave the others waiting.
    _compares_norms = False

    def __init__(self, optimizer: torch.optim.Optimizer, kinds: list[Kind]):
        super().__init__(optimizer, kinds, "tensor parallelism")
        sliced = [p for kind in kinds for p in kind.parameters if isinstance(p, DTensor)]
        odd = [p for p in sliced if len(p.placements) != 1 or not isinstance(p.placements[0], Shard)]
        if odd or not sliced or sliced[0].device_mesh.size() != dist.get_world_size():
            raise StructLoRAError(
                f"tensor parallelism with LoRA parameters placed as {(odd or sliced)[0].placements if sliced else 'none'} on "
                f"{dist.get_world_size()} processes",
                "slices of LoRA parameters, one for each process",
                "use tensor parallelism alone (PEFT >= 0.21, transformers >= 5.17), or shard with FSDP2 or ZeRO-3",
            )
        self._group = sliced[0].device_mesh.get_group()

    def read_gradients(self) -> list[Factors] | None:
        if not self._has_gradients():
            return None
        return [
            Factors(
                *(to_nodes(_whole([_gradient(p) for p in getattr(kind, side)]), side, kind) for side in SIDES)
            )
            for kind in self.kinds
        ]

    @torch.no_grad()
    def write_gradients(self, gradients: list[Factors], fill_missing: list[bool]) -> None:
        filled = self._to_fill(fill_missing)
        for parameter, value in self._with_values(gradients, SIDES):
            if parameter.grad is None and id(parameter) in filled:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                parameter.grad.copy_(_as_placed(parameter, value))

    def stored(self, factors: list[Factors]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        pairs = self._with_values(factors, SIDES, trained=False)
        yield from ((parameter, _as_placed(parameter, value.detach())) for parameter, value in pairs)

    def bad_gradients(self) -> Tensor:
        bad = super().bad_gradients()
        dist.all_reduce(bad, dist.ReduceOp.MAX, group=self._group)
        return bad

    @torch.no_grad()
    def write_working(self, effective: list[Factors], sides: tuple[str, ...]) -> None:
        for parameter, value in self._with_values(effective, sides):
            parameter.copy_(_as_placed(parameter, value))

    def _standing(self) -> list[Factors]:
        return [
            Factors(*(to_nodes(_whole(getattr(kind, side)), side, kind) for side in SIDES))
            for kind in self.kinds
        ]


def _as_placed(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """A whole value as the model holds the parameter."""
    value = value.reshape(parameter.shape).to(parameter.dtype)
    if not isinstance(parameter, DTensor):
        return value
    # Every rank has the whole value: none is sent.
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).float()


@torch.no_grad()
def _whole(tensors: list[Tensor]) -> Tensor:
    """Tensors of one shape, stacked; where they are sliced, all the slices in one collective."""
    first = tensors[0]
    if not isinstance(first, DTensor):
        return torch.stack([t.detach() for t in tensors])
    stack = torch.stack([t.to_local() for t in tensors])
    shape = torch.Size([len(tensors), *first.shape])
    stride = torch.empty(shape, dtype=torch.float32, device="meta").stride()
    placement = Shard(first.placements[0].dim + 1)
    return DTensor.from_local(
        stack, first.device_mesh, [placement], run_check=False, shape=shape, stride=stride
    ).full_tensor()
