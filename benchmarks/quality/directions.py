"""Which rank-one directions of a LoRA adapter to keep: rules that are compared at equal size.

Direction j of a module is B[:, j] A[j, :]. Put a gate m_j = 1 on it: the gradient of the loss with respect to this gate is
d_j = <∂L/∂B[:, j], B[:, j]>. Statistics of d_j over the steps of the second quarter of a run are what most rules go by. At
half of the run all directions of the model but the best are set to zero, factors and the optimizer's moments alike, so that
they stay exact zeros, and the others train on.

| rule | keeps the directions of |
|---|---|
| fisher | largest E[d²] on the training batches: the (empirical) Fisher information of the gate |
| held-back | largest E[d²] on a quarter of the examples, which are not trained on before the cut |
| gain | smallest E[d] on these held-back examples: to first order, closing a gate changes the loss by -d |
| true-fisher | largest E[d²] with labels drawn from the model: the true Fisher information |
| snr | largest E[d]² / Var[d] on the training batches: signal against noise |
| relative | largest E[d²] / (‖A[j, :]‖² ‖B[:, j]‖²): information relative to the size of the update |
| norm | largest ‖A[j, :]‖ ‖B[:, j]‖ (top-k norm) |
| random | chance, drawn once |
| singular | largest singular values of BA, over all modules together |
| uniform | largest singular values of each module's BA, as many in each module |
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .measures import kind_of, lora_factors
from .tasks import Split

RULES = (
    "fisher",
    "held-back",
    "gain",
    "true-fisher",
    "snr",
    "relative",
    "norm",
    "random",
    "singular",
    "uniform",
)
HOLD_BACK = ("held-back", "gain")
HELD_BACK_SHARE = 0.25  # of the training examples
SINGULAR = ("singular", "uniform")

_REACHED: dict[
    tuple, tuple
] = {}  # runs at the step of their cut: weights, states, gates' gradients, CPU seconds


@dataclass(frozen=True)
class Cut:
    """How an adapter is made smaller.

    Args:
        rule (`str`): one of `RULES`.
        keep (`float`): share of all directions of the model that is kept.
        at (`float`, *optional*, defaults to 0.5): share of the run after which the cut comes.
    """

    rule: str
    keep: float
    at: float = 0.5


class Selection:
    """Gathers statistics of the gates' gradients during a run, and makes the cut.

    Args:
        cut (`Cut`): the rule and the size.
        model (`nn.Module`): a PEFT model with plain LoRA adapters.
        optimizer (`torch.optim.Optimizer`): AdamW over its parameters.
        training (`Split`): the training examples.
        steps (`int`): length of the run.
        batch (`int`): examples of a step.
        seed (`int`): of the random rule and of the labels that are drawn.
    """

    def __init__(
        self, cut: Cut, model: nn.Module, optimizer, training: Split, steps: int, batch: int, seed: int
    ):
        if cut.rule not in RULES:
            raise SystemExit(f"found the rule {cut.rule}, expected one of {', '.join(RULES)}")
        self.cut, self.model, self.optimizer, self.training, self.batch = (
            cut,
            model,
            optimizer,
            training,
            batch,
        )
        self.modules = lora_factors(model)
        self.end = round(cut.at * steps)
        self.begin = self.end // 2
        self.holds_back = cut.rule in HOLD_BACK
        self.trained_on = len(training) - round(HELD_BACK_SHARE * len(training)) * self.holds_back
        self.generator = torch.Generator().manual_seed(seed + 2_000_000)
        self.gradients: dict[
            str, list[Tensor]
        ] = {}  # by where labels are from, (M, r) of each step; M: modules
        self.kept: Tensor | None = None  # (M, r), once the cut was made
        self.cpu_seconds = 0.0  # of the part before the cut, where another run made it

    def examples(self, step: int, chosen: Tensor) -> Tensor:
        """The step's examples: others in the place of those that are held back until the cut."""
        return chosen % self.trained_on if step < self.end else chosen

    def until_cut(self, train: Callable[[int, int], None], schedule, key: tuple) -> None:
        """Bring the run to the step of the cut: by training, or from the last run that was equal so far.

        Args:
            train (`Callable`): (first step, last step) -> None.
            schedule: of the learning rate.
            key (`tuple`): what the run's course depends on.
        """
        key = (*key, self.end, self.holds_back)
        weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if key not in _REACHED:
            started = time.process_time()
            train(0, self.end)
            while len(_REACHED) > 1:  # one that holds back, one that does not
                del _REACHED[next(iter(_REACHED))]
            states = self.optimizer.state_dict(), schedule.state_dict()
            reached = [w.detach() for w in weights], states, self.gradients, time.process_time() - started
            _REACHED[key] = copy.deepcopy(reached)
        else:
            values, states, self.gradients, self.cpu_seconds = copy.deepcopy(_REACHED[key])
            for weight, value in zip(weights, values, strict=True):
                weight.data.copy_(value)
            self.optimizer.load_state_dict(states[0])
            schedule.load_state_dict(states[1])

    def gather(self, step: int, batch: Split) -> None:
        """Call with the step's gradients in place, before the optimizer's step."""
        if not self.begin <= step < self.end:
            return
        Bs = [B for _, B in self.modules.values()]

        def keep(source: str, gradients) -> None:
            d = torch.stack([(g * B.detach()).sum(0) for g, B in zip(gradients, Bs, strict=True)])
            self.gradients.setdefault(source, []).append(d)

        def of(batch: Split, labels: Tensor):
            return torch.autograd.grad(self.model(**batch.inputs, labels=labels).loss, Bs)

        if self.holds_back:
            held_back = torch.arange(self.trained_on, len(self.training)).roll(
                -(step - self.begin) * self.batch
            )
            batch = self.training[held_back[: self.batch]]
            keep("held back", of(batch, batch.labels))
        else:
            keep("training", [B.grad for B in Bs])
            with torch.no_grad():
                shares = self.model(**batch.inputs).logits.softmax(1)
            keep("drawn", of(batch, torch.multinomial(shares, 1, generator=self.generator)[:, 0]))

    @torch.no_grad()
    def cut_now(self) -> None:
        """Keep the directions that the rule prefers and set the others to zero."""
        if self.cut.rule in SINGULAR:
            for A, B in self.modules.values():
                to_singular_basis(A, B, self.optimizer)
        scores = self.scores()
        count = round(self.cut.keep * scores.numel())
        self.kept = torch.zeros(scores.numel(), dtype=torch.bool)
        self.kept[scores.flatten().argsort(descending=True, stable=True)[:count]] = True
        self.kept = self.kept.view_as(scores)
        for (A, B), kept in zip(self.modules.values(), self.kept, strict=True):
            for tensor in (A, *moments(self.optimizer, A)):
                tensor[~kept] = 0
            for tensor in (B, *moments(self.optimizer, B)):
                tensor[:, ~kept] = 0

    def scores(self) -> Tensor:
        """What the rule thinks of each direction, (M, r): the largest are kept."""
        rule = self.cut.rule
        sizes = torch.stack([A.norm(dim=1) * B.norm(dim=0) for A, B in self.modules.values()])
        if rule == "random":
            return torch.rand(
                sizes.shape, generator=self.generator.manual_seed(self.generator.initial_seed())
            )
        # The singular values of a module are in order: its first ones before all second ones.
        if rule == "uniform":
            return -torch.arange(sizes.shape[1]).expand_as(sizes).float()
        if rule in ("norm", "singular"):
            return sizes
        source = "held back" if self.holds_back else "drawn" if rule == "true-fisher" else "training"
        d = torch.stack(self.gradients[source])  # (steps, M, r)
        return {
            "snr": lambda: d.mean(0).square() / d.var(0),
            "relative": lambda: d.square().mean(0) / sizes.square(),
            "gain": lambda: -d.mean(0),
        }.get(rule, lambda: d.square().mean(0))()

    def summary(self) -> dict:
        """For the store: how many directions were kept, by the module's name within its layer, and how many are not zero now."""
        kept: dict[str, int] = {}
        for name, of_module in zip(self.modules, self.kept, strict=True):
            kind = kind_of(name).rpartition(".*.")[2]
            kept[kind] = kept.get(kind, 0) + int(of_module.sum())
        not_zero = sum(int(((A != 0).any(1) & (B != 0).any(0)).sum()) for A, B in self.modules.values())
        return {
            "kept": kept,
            "of": self.kept.numel(),
            "not_zero": not_zero,
            "empty_modules": int((~self.kept.any(1)).sum()),
        }

    def parameters(self) -> int:
        """Parameters of the directions that were kept."""
        sizes = [A.shape[1] + B.shape[0] for A, B in self.modules.values()]
        return sum(size * int(kept.sum()) for size, kept in zip(sizes, self.kept, strict=True))


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """AdamW's running means of the gradient and of its square."""
    state = optimizer.state[parameter]
    return state["exp_avg"], state["exp_avg_sq"]


@torch.no_grad()
def to_singular_basis(A: Tensor, B: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Write B <- U S and A <- Vᵀ of the singular value decomposition BA = U S Vᵀ, largest first, in place.

    A becomes TA and B becomes BT⁻¹, so gradients of A change by T⁻ᵀ and those of B by Tᵀ, and AdamW's first moments with
    them. Its second moments change by the squares of these matrices' elements, which is an approximation.
    """
    left, left_triangle = torch.linalg.qr(B)
    right, right_triangle = torch.linalg.qr(A.T)
    U, S, Vt = torch.linalg.svd(left_triangle @ right_triangle.T)
    T = Vt @ torch.linalg.inv(right_triangle.T)
    inverse = right_triangle.T @ Vt.T
    A.copy_(Vt @ right.T)
    B.copy_(left @ (U * S))
    (A_mean, A_square), (B_mean, B_square) = moments(optimizer, A), moments(optimizer, B)
    A_mean.copy_(inverse.T @ A_mean)
    A_square.copy_(inverse.T.square() @ A_square)
    B_mean.copy_(B_mean @ T.T)
    B_square.copy_(B_square @ T.T.square())
