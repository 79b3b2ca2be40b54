"""`Slices` and `Exchange` in real processes, on parameters that are dealt out in several ways; started by torchrun.

Prints on the first rank, as JSON, what came out wrong in each case: the largest difference from the whole, over all ranks.
"""

from __future__ import annotations

import json
import math
import os

os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")

import torch
import torch.distributed as dist
from torch import nn

from structlora_trl.core.kinds import SIDES, Factors, Kind
from structlora_trl.engines.slices import Slices
from structlora_trl.engines.slicing import Exchange, Sharding

# (depths, r, k, d) of each kind. Widths that ranks cannot share evenly, and fewer rows of lora_A than ranks.
SHAPES = {
    "one kind": [(3, 2, 13, 7)],
    "two kinds": [(3, 2, 13, 7), (3, 5, 8, 11)],
    "other depths": [(3, 2, 13, 7), (1, 4, 6, 9)],
}
SHAPES["narrower than the ranks"] = [(2, 3, 2, 3)]


def by_rows(parameters, rank, world):
    """As FSDP2."""
    spans = {}
    for p in parameters:
        share = -(-p.shape[0] // world)
        spans[p] = tuple(min(i * share, p.shape[0]) * p.shape[1] for i in (rank, rank + 1))
    return spans


def by_entries(parameters, rank, world):
    """As ZeRO-3: shares begin in the middle of rows."""
    return {
        p: tuple(min(i * math.ceil(p.numel() / world), p.numel()) for i in (rank, rank + 1))
        for p in parameters
    }


def one_vector(parameters, rank, world):
    """As ZeRO-1 and 2: each depth is owned by other ranks."""
    share, start, spans = math.ceil(sum(p.numel() for p in parameters) / world), 0, {}
    for p in parameters:
        own = [min(max(i * share - start, 0), p.numel()) for i in (rank, rank + 1)]
        spans[p] = tuple(own)
        start += p.numel()
    return spans


def kinds_of(shapes):
    torch.manual_seed(0)
    return [
        Kind(
            f"kind {i}",
            [f"layers.{depth}" for depth in range(depths)],
            [nn.Parameter(torch.randn(r, k)) for _ in range(depths)],
            [nn.Parameter(torch.randn(d, r)) for _ in range(depths)],
        )
        for i, (depths, r, k, d) in enumerate(shapes)
    ]


def difference(pairs) -> float:
    return max([(a - b).abs().max().item() for a, b in pairs if a.numel()] or [0.0])


def moved_and_back(shapes, deal, sides) -> dict[str, float]:
    rank, world = dist.get_rank(), dist.get_world_size()
    kinds = kinds_of(shapes)
    parameters = [p for kind in kinds for p in (*kind.A, *kind.B)]
    spans = deal(parameters, rank, world)
    sharding = Sharding(kinds, dist.group.WORLD, spans.__getitem__)
    exchange = Exchange(sharding, [sides] * len(kinds))

    def fragment(p):
        start, stop = spans[p]
        return p.data.view(-1)[start:stop]

    slices = exchange.to_slices(fragment)
    wholes = [Factors(torch.stack(list(k.A)).detach(), torch.stack(list(k.B)).detach()) for k in kinds]
    triples = [
        (getattr(piece, side), getattr(whole, side), of_kind, side)
        for piece, whole, of_kind in zip(slices, wholes, sharding.slices, strict=True)
        for side in sides
    ]
    assert all(getattr(piece, side).numel() == 0 for piece in slices for side in SIDES if side not in sides)
    back = exchange.to_fragments(slices)
    assert {id(p) for p, _ in back} == {
        id(p) for kind in kinds for side in sides for p in getattr(kind, side)
    }
    return {
        "slices": difference((piece, own.part(whole, side)) for piece, whole, own, side in triples),
        "whole": difference((own.whole(piece, side), whole) for piece, whole, own, side in triples),
        "fragments": difference((value, fragment(p)) for p, value in back),
    }


def over_the_width() -> dict[str, float]:
    """What sums over the width, and its gradient, against the whole."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    x = torch.randn(3, 4, 2 * world + 1)
    # The last ranks may have nothing.
    bounds = [min(3 * i, x.shape[-1]) for i in range(world)] + [x.shape[-1]]
    slices = Slices(dist.group.WORLD, {"A": bounds})
    own, whole = (part.clone().requires_grad_() for part in (slices.part(x, "A"), x))
    norms, wanted = slices.sum_with_gradient(own.square().sum(-1)), whole.square().sum(-1)
    (own * norms[..., None]).sum().backward()
    (whole * wanted[..., None]).sum().backward()
    sums = slices.sums([own.detach().sum(), own.detach().sum(-1)])
    flags = torch.tensor([True, rank != world - 1])
    return {
        "sum with gradient": difference([(norms, wanted)]),
        "gradient": difference([(own.grad, slices.part(whole.grad, "A"))]),
        "sums": difference(zip(sums, (x.sum(), x.sum(-1)), strict=True)),
        "every": float(slices.every(flags).tolist() != [True, False]),
    }


def main():
    dist.init_process_group("gloo")
    found = {"sums": over_the_width()}
    for name, shapes in SHAPES.items():
        for deal in (by_rows, by_entries, one_vector):
            for sides in (("A",), ("B",), SIDES, ()):
                found[f"{name}, {deal.__name__}, {''.join(sides) or 'nothing'}"] = moved_and_back(
                    shapes, deal, sides
                )
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        largest = {name: {k: max(f[name][k] for f in everyone) for k in found[name]} for name in found}
        print(json.dumps(largest))
    dist.barrier()
    os._exit(0)  # see `distributed_job`


if __name__ == "__main__":
    main()
