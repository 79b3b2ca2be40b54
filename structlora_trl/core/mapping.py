"""The latent-to-effective map of one kind, and its pullback.

    latent (A, B)  --gates-->  (A, B̃ = B·diag(m)/m₀)  --message passing-->  effective (A', B')

The optimizer steps the latent factors; the model computes with the effective ones. All depths of a kind go through the
map at once: A is (L, r, k), B is (L, d, r), and ΔW = s·B·A at each depth.

Updates count from an origin: A₀ at attach, and B₀ = 0, but for initialisations that move part of the base weights into the
adapter (PiSSA and its kin). There B₀ is B at attach and the gates act on B − B₀: to gate the whole of B would switch the
base model's own principal directions on and off.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import StructLoRAConfig
from ..errors import StructLoRAError
from .coordinator import COORDINATORS
from .gates import kl_gradient, logit, sample_gates, top_k_mask
from .graph import DepthGraph
from .nodes import Kind, residual_role

ORIGINS = {"origin_A", "origin_B"}  # what updates count from, where a map keeps it


class Factors(NamedTuple):
    """Stacked factors of a kind, or anything of their shapes: A (L, r, k), B (L, d, r)."""

    A: Tensor
    B: Tensor


class KindMap(nn.Module):
    """The map of one kind: its gate logits, its graph and its coordinator.

    Args:
        kind (`Kind`): the modules it maps.
        config (`StructLoRAConfig`): which parts act.
        origin_A (`Tensor`): A₀, (L, r, k) or (1, r, k) where all depths are equal; kept where lora_A is compared.
        origin_B (`Tensor`, *optional*): B₀, (L, d, r); zero where omitted.
    """

    def __init__(self, kind: Kind, config: StructLoRAConfig, origin_A: Tensor, origin_B: Tensor | None = None):
        super().__init__()
        self.kind, self.config = kind, config
        depth_count, rank = kind.depth_count, kind.rank
        self.sides = compared_sides(kind, config)
        self.origin_A = origin_A if "A" in self.sides else None
        self.origin_B = origin_B

        self.logits = None
        if config.filter == "ib":
            start = torch.full((1 if config.share_gates else depth_count, rank), logit(config.gate_init))
            self.logits = nn.Parameter(start.to(kind.device))  # (L, r) or (1, r)
            self.initial_gate = torch.sigmoid(self.logits.detach()[:1, :1])  # m₀, exactly what attach divides by

        self.graph = DepthGraph(
            depth_count,
            config.edges,
            config.semantic_top_k,
            config.semantic_threshold,
            config.semantic_decay,
            kind.device,
        )
        self.coordinators = nn.ModuleDict()
        if config.coordinator != "none" and depth_count > 1:
            for side in self.sides:
                coordinator = COORDINATORS[config.coordinator](rank, config.coordinator_layers, config.activation)
                self.coordinators[side] = coordinator.to(kind.device)

    @property
    def gate_count(self) -> int:
        """Gates that are sampled: one per direction and depth."""
        return self.kind.depth_count * self.kind.rank

    @property
    def is_stochastic(self) -> bool:
        """Whether training weights differ from evaluation weights."""
        return self.config.filter in ("ib", "random")

    def forward(self, latent: Factors, noise: Tensor | None) -> Factors:
        """Effective factors of latent ones.

        Args:
            latent (`Factors`): fp32.
            noise (`Tensor`, *optional*): (L, r) logistic noise in training, None at evaluation.
        """
        filtered = self._filter(latent, noise)
        added = {side: c(self._features(filtered, side), self.graph) for side, c in self.coordinators.items()}
        A, B = filtered
        if "A" in added:
            A = A + added["A"]
        if "B" in added:
            B = B + added["B"].mT
        return Factors(A, B)

    def gates(self, latent: Factors, noise: Tensor | None) -> Tensor | None:
        """What each direction is multiplied with, (L, r), or None for 1 everywhere."""
        config = self.config
        if config.filter == "ib":
            if noise is None:
                open_ = torch.sigmoid(self.logits).expand(self.kind.depth_count, -1)
            else:
                open_ = sample_gates(self.logits, noise, config.temperature, config.hard_gates)
            return open_ / self.initial_gate
        if config.filter == "random" and noise is not None:
            return (noise + logit(config.gate_init) > 0).float() / config.gate_init
        if config.filter == "topk_norm":
            with torch.no_grad():
                return top_k_mask(
                    latent.A, self._update_B(latent.B), keep=max(1, int(config.gate_init * self.kind.rank))
                )
        return None

    def openness(self, latent: Factors) -> Tensor | None:
        """Probability that each direction is open, (L, r): σ(φ); 0 or 1 for 'topk_norm'; None where no filter decides."""
        if self.logits is not None:
            return torch.sigmoid(self.logits.detach()).expand(self.kind.depth_count, -1)
        return self.gates(latent, None)

    def pullback(
        self, latent: Factors, gradient: Factors, noise: Tensor | None, scale: float = 1.0
    ) -> tuple[Factors, dict[str, Tensor]]:
        """The gradient with respect to effective factors, carried to latent factors and to the map's own parameters.

        One vector-Jacobian product; by the chain rule this is training through the map.

        Args:
            latent (`Factors`): fp32, as they were when the effective factors were made.
            gradient (`Factors`): fp32 gradients of the task loss with respect to the effective factors, times `scale`.
            noise (`Tensor`, *optional*): the same noise as in `forward`.
            scale (`float`, *optional*, defaults to 1.0): loss scale of mixed precision.

        Returns:
            Gradients of the latent factors (still times `scale`), and a dict from parameter name to gradient (unscaled),
            both of the task loss alone but for the regulariser's share of the former.
        """
        leaves = Factors(*(factor.detach().requires_grad_() for factor in latent))
        own = dict(self.named_parameters())
        with torch.enable_grad():
            effective = self(leaves, noise)
            outputs, cotangents = list(effective), list(gradient)
            if self.config.regularizer != "none" and self.kind.depth_count > 1:
                outputs.append(self.regularizer(leaves))
                cotangents.append(torch.tensor(self.config.regularizer_weight * scale, device=self.kind.device))
            pulled = torch.autograd.grad(outputs, [*leaves, *own.values()], cotangents)
        return Factors(*pulled[:2]), {name: g / scale for name, g in zip(own, pulled[2:])}

    def objective_gradients(self, task: dict[str, Tensor], kl_scale: float) -> dict[str, Tensor]:
        """Task gradients of the map's parameters turned into those of L_task + λ(β·KL − γ·I), for the gate logits.

        Args:
            task (`dict`): what `pullback` returned.
            kl_scale (`float`): λβ over the number of gates in the model, so that the KL is a mean over all of them.
        """
        if self.logits is None:
            return task
        weight = kl_scale * (self.kind.depth_count if self.config.share_gates else 1)
        kl = weight * kl_gradient(self.logits.detach(), self.config.prior)
        return {**task, "logits": self.config.label_weight * task["logits"] + kl}

    def restore(self, state: dict[str, Tensor]) -> Factors:
        """Take over a saved state of this kind: origins, logits, Θ and graph.

        Args:
            state (`dict`): what `Runtime.state_dict` holds for the kind, without the kind's name.

        Returns:
            The latent factors, fp32.
        """
        own = {name: value for name, value in state.items() if not name.startswith(("latent_", "graph.", "origin_"))}
        self.load_state_dict(own)
        for origin in ORIGINS & state.keys():
            setattr(self, origin, state[origin].to(self.kind.device))
        self.graph.load_state_dict({n.removeprefix("graph."): v for n, v in state.items() if n.startswith("graph.")})
        return Factors(state["latent_A"], state["latent_B"])

    def features(self, factors: Factors) -> list[Tensor]:
        """Node features, the updates on the sides that are comparable across depth: (L, r, n) each."""
        return [self._features(factors, side) for side in self.sides]

    def side_gradients(self, gradient: Factors) -> Tensor:
        """Gradients on those sides, flattened: (L, n)."""
        return torch.cat([getattr(gradient, side).flatten(1) for side in self.sides], dim=1)

    def regularizer(self, latent: Factors) -> Tensor:
        """LoRA+Cos: Σ (1 − cos(u_l, u_l+1)); LoRA+Laplacian: Σ ‖u_l+1 − u_l‖², over neighbouring depths."""
        total = torch.zeros((), device=self.kind.device)
        for u in self.features(latent):
            u = u.flatten(1)
            if self.config.regularizer == "cosine":
                total = total + (1 - nn.functional.cosine_similarity(u[1:], u[:-1])).sum()
            else:
                total = total + (u[1:] - u[:-1]).square().sum()
        return total

    def _filter(self, latent: Factors, noise: Tensor | None) -> Factors:
        gates = self.gates(latent, noise)
        if gates is None:
            return latent
        filtered = self._update_B(latent.B) * gates[:, None, :]
        if self.origin_B is not None:
            filtered = self.origin_B + filtered
        if self.config.filter == "topk_norm":
            # Closed directions still learn (straight through), or the first choice would be the last.
            filtered = latent.B + (filtered - latent.B).detach()
        return Factors(latent.A, filtered)

    def _update_B(self, B: Tensor) -> Tensor:
        return B if self.origin_B is None else B - self.origin_B

    def _features(self, factors: Factors, side: str) -> Tensor:
        return factors.A - self.origin_A if side == "A" else self._update_B(factors.B).mT


def compared_sides(kind: Kind, config: StructLoRAConfig) -> tuple[str, ...]:
    """The factors of a kind that are compared across depth: ('A',), ('B',) or both.

    Raises:
        StructLoRAError: `side='auto'`, depths are to be compared, and the module's role is unknown.
    """
    if config.side == "both":
        return ("A", "B")
    role = config.side
    if role == "auto":
        role = residual_role(kind, config.roles)
        if role is None and config.compares_depths and kind.depth_count > 1:
            leaf = kind.modules[0].rsplit(".", 1)[-1]
            raise StructLoRAError(
                f"module '{kind.modules[0]}', whose role is unknown",
                "to know whether it reads the residual stream (its lora_A is comparable across depth) or writes it (its lora_B is)",
                f"set `roles={{'{leaf}': 'read'}}` or `'write'`, or choose `side` yourself",
            )
    return ("B",) if role == "write" else ("A",)


def refuse_unmappable(kinds: list[Kind], config: StructLoRAConfig) -> None:
    """Stop before anything is touched where the map cannot act as asked.

    Raises:
        StructLoRAError: a coordinator is asked for and no kind has two depths; the role of a kind is needed and unknown; or
            a factor that would be mapped is frozen.
    """
    if config.coordinator != "none" and all(kind.depth_count == 1 for kind in kinds):
        raise StructLoRAError(
            f"only one depth in every kind ({', '.join(kind.name for kind in kinds)})",
            "two depths or more of some kind for a coordinator",
            "adapt more layers, or set `coordinator='none'`",
        )
    for kind in kinds:
        mapped = {"B"} if config.filter != "none" else set()
        if config.compares_depths and kind.depth_count > 1:
            mapped |= set(compared_sides(kind, config))
        for side in sorted(mapped):
            if not getattr(kind, side)[0].requires_grad:
                remedy = (
                    "set `side='write'` or `coordinator='none'`" if side == "A" else "train it, or set `filter='none'`"
                )
                raise StructLoRAError(
                    f"lora_{side} of '{kind.name}' frozen", f"a trainable lora_{side}, since StructLoRA maps it", remedy
                )
