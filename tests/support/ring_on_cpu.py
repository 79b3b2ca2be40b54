"""Context parallelism on CPU: torch's ring attention knows the kernels of GPUs alone, and stops at the CPU's.

What is around it, the ring and the order of its shares, stays torch's own.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental._context_parallel import _attention as ring

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
SEQUENCE = 2  # of (batch, heads, sequence, width)


def offer_ring_attention_on_cpu() -> None:
    """Let `context_parallel` take the CPU's flash attention as it takes CUDA's."""
    ring.custom_ops.update({FORWARD: _forward, BACKWARD: _backward})


def _forward(_, args, kwargs):
    query, key, value, dropout, is_causal = (*args, 0.0, False)[:5]
    local, wrap = _unwrapped(query, key, value)
    return wrap(
        ring._templated_ring_attention(
            query.device_mesh.get_group(),
            SEQUENCE,
            FORWARD,
            *local,
            is_causal=is_causal,
            dropout_p=dropout,
            **kwargs,
        )
    )


def _backward(_, args, kwargs):
    gradient, query, key, value, out, logsumexp, dropout, is_causal = args
    (gradient, query_, key, value, out, logsumexp), wrap = _unwrapped(
        gradient, query, key, value, out, logsumexp
    )
    return wrap(
        ring._templated_ring_attention_backward(
            query.device_mesh.get_group(),
            SEQUENCE,
            BACKWARD,
            gradient,
            "grad_out",
            query_,
            key,
            value,
            out,
            logsumexp,
            is_causal,
            dropout_p=dropout,
            **kwargs,
        )
    )


def _unwrapped(*tensors: DTensor):
    mesh, placements = tensors[0].device_mesh, tensors[0].placements
    return [t.to_local() for t in tensors], lambda results: tuple(
        DTensor.from_local(r, mesh, placements, run_check=False) for r in results
    )
