"""A trained LoRA adapter made smaller by what `structlora export` does, by what others do, and by what was tried.

At one rank for all modules, k of r:

| rule | keeps of each module |
|---|---|
| activations | the principal components of its output on training examples |
| svd | the largest singular values of its update (PEFT's conversion, mergekit, `export --rank`) |
| information | the singular directions of largest Fisher information |
| random | singular directions drawn by chance |

Over the whole model, with as many parameters, so that ranks differ:

| rule | keeps |
|---|---|
| global-information | the singular directions of largest Fisher information (`export --keep --data`) |
| global-svd | the largest singular values |
| sv-fro, sv-cumulative | of each module the fewest singular values that hold a share of the norm, or of their sum, as kohya's
  `resize_lora.py` does; the share is the one at which the size is right (sv-fro: `export --keep` without rows) |

Each as cut; activations, svd and global-information also after 100 steps in which the smaller adapter learns the whole
one's outputs on the training examples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel
from torch import Tensor

from structlora_trl.adapters.base_model import factors_of, put
from structlora_trl.adapters.distilling import distil
from structlora_trl.adapters.measuring import gate_information
from structlora_trl.adapters.peft_scaling import singular_directions

from .measures import lora_factors, truncate
from .tasks import Split

EXAMPLES = 64  # that directions are chosen on, as `structlora export` takes them
ONE_RANK = ("activations", "svd", "information", "random")
GLOBAL = ("global-information", "global-svd", "sv-fro", "sv-cumulative")
RULES = (*ONE_RANK, *GLOBAL)
DISTILLED = ("activations", "svd", "global-information")
_HALVINGS = 40  # of the interval in which a rule's share is sought


def shrink(
    model: PeftModel, training: Split, keep: float, seed: int, test: Callable[[], dict], rules=RULES
) -> dict[str, dict]:
    """Test figures of a trained adapter made smaller to a share of its rank by each rule, as cut and distilled.

    The adapter stands as it was afterwards; its gradients are cleared.

    Args:
        model (`PeftModel`): in evaluation mode, with one LoRA adapter of one rank and scale.
        training (`Split`): examples that it was trained on.
        keep (`float`): share of the rank, and of the parameters.
        seed (`int`): of what is drawn.
        test (`Callable`): () -> figures of the model as it stands then.

    Returns:
        rule -> `cut` and, of `DISTILLED`, `distilled` (accuracy and NLL each), `parameters`, and the largest `rank` of a
            module.
    """
    trained = _file(model)
    rows = [_row(training, i) for i in range(len(training))]
    candidates = _candidates(model, rows[:EXAMPLES], keep, seed, rules)
    singular = _file(model)
    found = {}
    for rule, small in candidates.items():
        put(model, small)
        found[rule] = {"cut": _short(test()), **_size(small)}
        if rule in DISTILLED:
            taught = distil(model, singular, small, rows)
            put(model, taught.tensors)
            found[rule] |= {"distilled": _short(test()), "steps": taught.steps}
    put(model, trained)
    for parameter in model.parameters():
        parameter.grad = None
    return found


def _candidates(
    model: PeftModel, rows: list[dict], keep: float, seed: int, rules
) -> dict[str, dict[str, Tensor]]:
    """rule -> factors with zeros in place of what is dropped. The model is left in its singular directions."""
    with torch.no_grad():
        for A, B in lora_factors(model).values():
            directions = singular_directions(A.double(), B.double())
            A.copy_(directions.A)
            B.copy_(directions.B)
    moments = rank_moments(model, rows)
    information = {module: values[0] for module, values in gate_information(model, rows).items()}
    whole = {
        module: (sides["A"].detach(), sides["B"].detach()) for module, sides in factors_of(model).items()
    }
    sigma = {module: A.norm(dim=1) * B.norm(dim=0) for module, (A, B) in whole.items()}
    cost = {module: A.shape[1] + B.shape[0] for module, (A, B) in whole.items()}  # parameters of a direction
    rank = next(iter(sigma.values())).numel()
    k = max(1, round(keep * rank))
    budget = k * sum(cost.values())
    generator = torch.Generator().manual_seed(seed + 4_000_000)
    chance = {module: torch.rand(rank, generator=generator) for module in sigma}
    scores = {"svd": sigma, "information": information, "random": chance}
    masks = {rule: {m: _largest(of[m], k) for m in of} for rule, of in scores.items()}
    masks["global-information"] = _within(information, cost, budget)
    masks["global-svd"] = _within({m: s.square() for m, s in sigma.items()}, cost, budget)
    for rule, power in (("sv-fro", 2), ("sv-cumulative", 1)):
        masks[rule] = _at_one_share(sigma, cost, budget, power)
    found = {}
    for rule in rules:
        parts = {}
        for module, (A, B) in whole.items():
            if rule == "activations":
                A, B, _ = principal_outputs(A, B, moments[module])
                mask = torch.arange(rank) < k
            else:
                mask = masks[rule][module]
            parts |= {f"{module}.lora_A.weight": A * mask[:, None], f"{module}.lora_B.weight": B * mask}
        found[rule] = parts
    return found


@torch.no_grad()
def rank_moments(model: PeftModel, rows: list[dict]) -> dict[str, Tensor]:
    """Second moments of what each module's lora_A makes of its inputs: mean over rows and positions of a aᵀ, a = A x. From
    forward passes alone, without labels; they belong to the directions as they stand in the model.

    Args:
        model (`PeftModel`): in evaluation mode, with one LoRA adapter of linear modules.
        rows (`list[dict[str, Tensor]]`): one example each.

    Returns:
        module -> (r, r), in fp64.
    """
    seen: dict[str, list[Tensor]] = {module: [] for module in factors_of(model)}

    def watch(module: str):
        return lambda layer, inputs, output: seen[module].append(output.double().flatten(0, -2))

    hooks = [
        model.get_submodule(module).lora_A["default"].register_forward_hook(watch(module)) for module in seen
    ]
    for row in rows:
        model(**row)
    for hook in hooks:
        hook.remove()
    activations = {module: torch.cat(parts) for module, parts in seen.items()}
    return {module: a.mT @ a / len(a) for module, a in activations.items()}


def principal_outputs(A: Tensor, B: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of the same product whose columns of B are the principal directions of the output, the largest first, with the
    mean squares (r,) of the output along them.

    The best of rank k in mean square over the rows: the part of the update that writes into the span of the first k.

    Args:
        A, B (`Tensor`): (r, k) and (d, r), in singular directions: B's columns are orthogonal.
        moments (`Tensor`): (r, r), E[a aᵀ] of a = A x, as `rank_moments` gives it.
    """
    wide_A, wide_B = A.double(), B.double()
    sizes = wide_B.norm(dim=0)  # (r,)
    unit = wide_B / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)
    energy, turn = torch.linalg.eigh(sizes[:, None] * moments * sizes)  # ascending
    energy, turn = energy.flip(0).clamp(min=0), turn.flip(1)
    new_B, new_A = unit @ turn, turn.mT @ (sizes[:, None] * wide_A)
    root = new_A.norm(dim=1).sqrt()  # shared equally, as singular values are
    new_B, new_A = new_B * root, new_A / root.clamp(min=torch.finfo(root.dtype).tiny)[:, None]
    return new_A.to(A.dtype), new_B.to(B.dtype), energy


def _largest(values: Tensor, count: int) -> Tensor:
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[values.argsort(descending=True, stable=True)[:count]] = True
    return mask


def _within(worth: dict[str, Tensor], cost: dict[str, int], budget: int) -> dict[str, Tensor]:
    """The directions of most worth over all modules, as long as there is room."""
    masks = {module: torch.zeros(len(values), dtype=torch.bool) for module, values in worth.items()}
    ranked = sorted(
        ((float(value), module, j) for module, values in worth.items() for j, value in enumerate(values)),
        key=lambda entry: -entry[0],
    )
    for _, module, j in ranked:
        if cost[module] > budget:
            break
        budget -= cost[module]
        masks[module][j] = True
    return masks


def _at_one_share(
    sigma: dict[str, Tensor], cost: dict[str, int], budget: int, power: int
) -> dict[str, Tensor]:
    """Of each module the fewest singular values (at least one) with a share of the sum of their powers, one share for all: the
    largest with which there is room.
    """

    def masks_at(share: float) -> dict[str, Tensor]:
        found = {}
        for module, values in sigma.items():
            ordered = values.double().pow(power).sort(descending=True).values
            count = int((ordered.cumsum(0) < share * ordered.sum()).sum()) + 1
            found[module] = _largest(values, min(count, len(values)))
        return found

    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = sum(cost[m] * int(mask.sum()) for m, mask in masks_at(middle).items()) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return masks_at(low)


class Squeeze:
    """LoRA-Squeeze (arXiv 2602.10993), in stages: train at a high rank, halve it by SVD at equal distances, and go on.

    Args:
        model (`PeftModel`): with one adapter of rank `rank`.
        optimizer (`torch.optim.Optimizer`): its moments of the factors start anew at each stage.
        rank (`int`): at the beginning.
        to (`int`): at the end, of which `rank` is a power of two times.
        steps (`int`): of the run.
    """

    def __init__(self, model: PeftModel, optimizer: torch.optim.Optimizer, rank: int, to: int, steps: int):
        self._model, self._optimizer = model, optimizer
        stages = (rank // to).bit_length() - 1
        self._ranks = {round(steps * (i + 1) / (stages + 1)): rank >> (i + 1) for i in range(stages)}

    def after(self, step: int) -> None:
        """After an optimizer step, counted from 1."""
        if step in self._ranks:
            rank = self._ranks[step]
            truncate(self._model, rank)
            with torch.no_grad():
                for A, B in lora_factors(self._model).values():
                    A[rank:] = 0  # with zeros on both sides a direction has no gradient
                    for factor in (A, B):
                        self._optimizer.state.pop(factor, None)


def _file(model: PeftModel) -> dict[str, Tensor]:
    """The factors under the names of an adapter's file."""
    return {
        f"{module}.lora_{side}.weight": parameter.detach().clone()
        for module, sides in factors_of(model).items()
        for side, parameter in sides.items()
    }


def _row(split: Split, index: int) -> dict[str, Tensor]:
    row = split[torch.tensor([index])]
    return {**row.inputs, "labels": row.labels}


def _short(figures: dict) -> dict:
    return {name: figures[name] for name in ("accuracy", "nll")}


def _size(small: dict[str, Tensor]) -> dict[str, int]:
    ranks = {name: int(x.any(0).sum()) for name, x in small.items() if "lora_B" in name}
    parameters = sum(
        rank * (len(small[name]) + small[name.replace("lora_B", "lora_A")].shape[1])
        for name, rank in ranks.items()
    )
    return {"parameters": parameters, "rank": max(ranks.values())}
