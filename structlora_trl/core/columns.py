"""Maps that treat the columns of a stack of factors alike, applied and pulled back to a block of columns at a time.

Applied to a whole stack, each of a map's operations reads and writes main memory, in temporaries so large that a CPU's
allocator takes them from the system anew, page by page. A block of columns stays in the cache, and its temporaries are reused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# What a block holds. On a CPU, a few of them fit its second cache (1 MB or so); narrower ones would make the products over the
# rank slow. Elsewhere a block bounds the temporaries' memory, and is large enough to keep the device busy.
_CPU_ENTRIES, _ENTRIES = 2**17, 2**24
_LEAST_WIDTH = 64

ColumnMap = Callable[[Tensor, Tensor | None], Tensor]
"""(columns of a stack, the same columns of its origin) -> what they are mapped to, of the first one's shape."""


@torch.no_grad()
def map_columns(
    function: ColumnMap, stack: Tensor, origin: Tensor | None, dim: int, into: Tensor | None = None
) -> Tensor:
    """What a map makes of a stack of factors.

    Args:
        function (`Callable`): the map.
        stack (`Tensor`): factors of all depths, (L, r, k) or (L, d, r).
        origin (`Tensor`, *optional*): where their updates count from, of the same width.
        dim (`int`): the stack's axis of columns, which the map treats alike.
        into (`Tensor`, *optional*): of the stack's shape, where to write; a new tensor where omitted.

    Returns:
        `Tensor` of the stack's shape.
    """
    mapped = torch.empty_like(stack) if into is None else into
    for block, start, target in _blocks(dim, stack, origin, mapped):
        target.copy_(function(block, start))
    return mapped


def pull_columns(
    function: ColumnMap,
    stack: Tensor,
    origin: Tensor | None,
    gradient: Tensor,
    own: list[Tensor],
    dim: int,
    into: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of what `map_columns` returns, carried back to the stack, and to what else the map depends on.

    Args:
        gradient (`Tensor`): of the stack's shape.
        own (`list[Tensor]`): what else the map depends on, such as weights: all of it, each requiring a gradient.
        into (`Tensor`, *optional*): of the stack's shape, where to write its gradient; a new tensor where omitted.

    Returns:
        The stack's gradient, and the gradients of `own`.
    """
    pulled = torch.empty_like(stack) if into is None else into
    sums = [torch.zeros_like(part) for part in own]
    for block, start, arriving, target in _blocks(dim, stack, origin, gradient, pulled):
        leaf = block.detach().requires_grad_()
        with torch.enable_grad():
            mapped = function(leaf, start)
        found, *shares = torch.autograd.grad(mapped, [leaf, *own], arriving)
        target.copy_(found)
        if sums:
            torch._foreach_add_(sums, shares)
    return pulled, sums


def _blocks(dim: int, stack: Tensor, *others: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """The same columns of each, block after block."""
    width = stack.shape[dim]
    entries = _CPU_ENTRIES if stack.device.type == "cpu" else _ENTRIES
    step = max(_LEAST_WIDTH, entries * width // max(stack.numel(), 1))
    for begin in range(0, width, step):
        count = min(step, width - begin)
        yield tuple(part if part is None else part.narrow(dim, begin, count) for part in (stack, *others))
