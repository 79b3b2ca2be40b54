"""From effective factors back to latent ones, for weights that were written by someone else."""

from __future__ import annotations

import torch

from .mapping import Factors, KindMap

_ITERATIONS = 50
_TOLERANCE = 1e-6  # of the largest entry; fp32 rounds at 6e-8


@torch.no_grad()
def latents_of(m: KindMap, effective: Factors, start: Factors) -> Factors | None:
    """Latent factors whose evaluation factors are `effective`, or None where none are found.

    Fixed-point iteration. Gates alone are linear in B, and exact after one; a coordinator's messages are small beside what
    they are added to, so that each iteration shrinks the error.

    Args:
        effective (`Factors`): A (L, r, k), B (L, d, r), fp32.
        start (`Factors`): latent factors to start from.
    """
    # Infinity would be within any tolerance of anything.
    finite = torch.stack([part.isfinite().all() for part in effective]).all()
    latent, scales = start, [m.width.peak(part, (0, 1, 2)) for part in effective]
    if not m.width.every(finite):
        return None
    for _ in range(_ITERATIONS):
        errors = [wanted - found for wanted, found in zip(effective, m(latent, None), strict=True)]
        within = [(error.abs() <= _TOLERANCE * scale).all() for error, scale in zip(errors, scales, strict=True)]
        if m.width.every(torch.stack(within).all()):
            return latent
        errors = m.ungated(latent, Factors(*errors))
        latent = Factors(*(part + error for part, error in zip(latent, errors, strict=True)))
    return None
