"""One factor of a kind, lora_A or lora_B of all its modules, with what the map adds to it.

The model and the optimizer hold effective values alone. What the map makes them of, the latent values, are what
stands less an offset, so that whatever else writes to the model between steps moves both:

    before a step    gradients are carried back through the map at latent = p - offset
    after it         latent = p - offset;  p <- map(latent);  offset <- p - latent

Where ranks hold parts of each parameter, whole factors are gathered side by side, mapped on every rank, and the
own parts kept; offset and running mean stay in parts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .core.mapping import KindMap
from .engines.base import Layout, Rate, copy_values


class MappedSide:
    """A side of a kind that its map changes.

    Args:
        m (`KindMap`): the map.
        layout (`Layout`): of the side's parameters, and which of them this rank holds.

    Attributes:
        offset (`Tensor`): effective less latent values of this rank's parts, flat, fp32.
        rate (`Rate`): of the last step.
        mean (`Tensor`, *optional*): running mean of the effective factors' gradients, alike; None before the
            first, and where no edge follows gradients.
    """

    def __init__(self, m: KindMap, layout: Layout):
        layout.engine.refuse_unmappable(m.kind, layout.side)
        self.map, self.side, self.engine, self.layout = m, layout.side, layout.engine, layout
        self.parameters, self.rate = layout.parameters, Rate(0.0, 0.0)
        self.offset = torch.zeros_like(self.layout.standing())
        self.mean: Tensor | None = None

    @property
    def coordinator(self) -> nn.Module | None:
        return self.map.coordinators[self.side] if self.side in self.map.coordinators else None

    @property
    def follows_gradients(self) -> bool:
        """Whether edges of its graph follow its gradients."""
        return self.coordinator is not None and self.map.graph.follows_gradients

    def is_moving(self) -> bool:
        """Return whether a backward has reached the side; a side that none has reached rests."""
        return any(self.engine.gradient(p) is not None for p in self.parameters)

    def pull(self) -> tuple[list[tuple[nn.Parameter, Tensor]], list[Tensor], Tensor]:
        """Carry the gradients that a backward left to the latent factors.

        Returns:
            Gradients of this rank's parts of the latent factors, flat; of the coordinator's parameters; and the
            effective factors' own, of all nodes and without those of closed directions.
        """
        found = [(self.engine.values(p), self.engine.gradient(p)) for p in self.parameters]
        joined = self.layout.join(torch.zeros_like(value) if g is None else g for value, g in found)
        gradient = self.layout.whole(joined)
        latent = self.layout.whole(self.layout.standing() - self.offset)
        pulled, of_own = self.map.pullback(self.side, latent, gradient)
        # A coordinator passes gradients on to layers that a backward has not reached.
        taken = [(p, value) for p, value in self.layout.split(self.layout.own(pulled)) if p.requires_grad]
        if self.coordinator is None:
            taken = [(p, value) for p, value in taken if self.engine.gradient(p) is not None]
        return taken, of_own, self.map.masked(self.side, gradient)

    def observe(self, gradient: Tensor) -> None:
        """Take a gradient of all nodes into the running mean."""
        own = self.layout.own(gradient)
        self.mean = own if self.mean is None else self.mean.lerp_(own, 1 - self.map.graph.decay)

    @torch.no_grad()
    def write(self, rests: Callable[[nn.Parameter], bool]) -> None:
        """Map what the optimizer made, and put it where the optimizer left that; parameters that rest stay."""
        latent = self.layout.standing() - self.offset
        effective = self.layout.own(self.map(self.side, self.layout.whole(latent)))
        pairs = [(p, value) for p, value in self.layout.split(effective) if not rests(p)]
        copy_values([self.engine.values(p) for p, _ in pairs], [value for _, value in pairs])
        is_exact = len(pairs) == len(self.parameters) and all(p.dtype == torch.float32 for p, _ in pairs)
        self.offset = (effective if is_exact else self.layout.standing()) - latent
