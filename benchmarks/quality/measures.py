"""What is measured of a trained model: accuracy, NLL and calibration, their controls, figures of structure."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

from structlora_trl.shrink.measuring import SCALES

from .tasks import NO_LABEL, Split

EVALUATION_BATCH = 32
GRADIENT_EXAMPLES = 64  # that the final gradients are taken on


def evaluate(model: nn.Module, split: Split) -> dict[str, float]:
    """Return `figures` of the model as it stands in evaluation mode."""
    return figures(logits_of(model, split), split.labels)


@torch.inference_mode()
def logits_of(model: nn.Module, split: Split) -> torch.Tensor:
    """Return logits (n, classes) of a split; where each example has several labels, (n, labels, classes)."""
    parts = torch.arange(len(split)).split(EVALUATION_BATCH)
    return torch.cat([model(**split[part].inputs).logits.float() for part in parts])


def figures(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return accuracy and ECE in percent, and NLL in nats."""
    logits, labels = logits[labels != NO_LABEL], labels[labels != NO_LABEL]
    confidence, answer = logits.softmax(1).max(1)
    right = answer == labels
    return {
        "accuracy": round(100 * right.double().mean().item(), 3),
        "nll": round(cross_entropy(logits, labels).item(), 5),
        "ece": round(100 * calibration_error(confidence, right), 3),
    }


TEMPERATURES = [20 / i for i in range(1, 61)]  # from 20 to 1/3


def tempered(
    validation: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, float]:
    """Return test figures with logits over the one of `TEMPERATURES` of lowest validation NLL (arXiv 1706.04599).

    The control for methods that lower the NLL without other answers: what calibration alone gives.

    Args:
        validation, test (`tuple`): logits (n, classes) and labels (n,).
    """
    logits, labels = (x[validation[1] != NO_LABEL] for x in validation)
    best = min(TEMPERATURES, key=lambda T: cross_entropy(logits / T, labels).item())
    return {"temperature": best, **figures(test[0] / best, test[1])}


@torch.no_grad()
def scaled(
    model: nn.Module, whole: dict, validation: Callable[[], dict], test: Callable[[], dict]
) -> dict | None:
    """Return test figures with every update ΔW times that scalar of `SCALES` whose NLL on validation examples is lowest.

    The control for methods that lower the NLL by making an update smaller. The adapter is left as it was.

    Args:
        model (`nn.Module`): a PEFT model with LoRA adapters.
        whole (`dict`): validation figures of the model as it is.
        validation, test (`Callable`): () -> figures of the model as it stands then.

    Returns:
        `dict`, *optional*: `scale` and the figures; None where no scalar is better than 1.
    """
    Bs = [parameter for name, parameter in model.named_parameters() if ".lora_B." in name]
    trained = [B.clone() for B in Bs]

    def at(scale: float, figures: Callable[[], dict]) -> dict:
        for B, value in zip(Bs, trained, strict=True):
            B.copy_(value * scale)
        return figures()

    nlls = {scale: at(scale, validation)["nll"] for scale in SCALES if scale < 1}
    best = min(nlls, key=nlls.get)
    found = {"scale": best, **at(best, test)} if nlls[best] < whole["nll"] else None
    at(1.0, dict)
    return found


class BestSoFar:
    """The trained weights of lowest validation NLL.

    Args:
        model (`nn.Module`): whose trained parameters are kept.
    """

    def __init__(self, model: nn.Module):
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._nll, self._best = float("inf"), None

    def see(self, nll: float) -> None:
        """Keep the weights as they are now, where this NLL is the lowest."""
        if nll < self._nll:
            self._nll, self._best = nll, [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the model the best weights; nothing where none were seen."""
        for parameter, value in zip(self._parameters, self._best or (), strict=self._best is not None):
            parameter.copy_(value)


def calibration_error(confidence: torch.Tensor, right: torch.Tensor, bins: int = 10) -> float:
    """Return the expected calibration error: |accuracy − mean confidence| of equal ranges of confidence, weighted by examples."""
    place = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right.double() - confidence.double())
    return (gaps.abs().sum() / len(right)).item()


def lora_factors(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return lora_A (r, k) and lora_B (d, r) by module name, the parameters themselves."""
    found = dict(model.named_parameters())
    names = [
        name.removesuffix(".lora_A.default.weight")
        for name in found
        if name.endswith(".lora_A.default.weight")
    ]
    return {n: (found[f"{n}.lora_A.default.weight"], found[f"{n}.lora_B.default.weight"]) for n in names}


def kind_of(module: str) -> str:
    """Return a module's name without its depth: equal for modules that differ only in depth."""
    return re.sub(r"\.\d+\.", ".*.", module)


def diagnostics(model: nn.Module, start_A: dict, validation: Split) -> dict[str, float]:
    """Return the paper's figures of structure, of the trained adapter without noise, mean over the adapted kinds.

    Drift energy Σ‖ΔW_l+1 − ΔW_l‖² over Σ‖ΔW_l‖², adjacent cosines of ΔW, of A − A₀ and of the loss gradient with respect
    to W (on validation examples), and the share of ΔW's energy in its first singular direction.
    """
    found = lora_factors(model)
    if not found:
        return {}
    A, B = ({name: pair[i].detach() for name, pair in found.items()} for i in range(2))
    weights = {name: dict(model.named_modules())[name].base_layer.weight for name in A}
    for weight in weights.values():
        weight.requires_grad_(True)
    batch = validation[torch.arange(GRADIENT_EXAMPLES)]
    logits = model(**batch.inputs).logits
    gradients = dict(
        zip(
            weights,
            torch.autograd.grad(cross_entropy(logits, batch.labels), list(weights.values())),
            strict=True,
        )
    )
    for weight in weights.values():
        weight.requires_grad_(False)
    sums: dict[str, float] = {}
    kinds: dict[str, list[str]] = {}
    for name in A:
        kinds.setdefault(kind_of(name), []).append(name)
    for names in kinds.values():
        updates = torch.stack([B[name] @ A[name] for name in names])  # (L, d, k)
        both = [
            torch.linalg.qr(torch.stack(f)).R for f in zip(*((B[n], A[n].mT) for n in names), strict=True)
        ]
        singular = torch.linalg.svdvals(both[0] @ both[1].mT)  # of the updates, from r x r products
        update = updates.flatten(1)
        moved = torch.stack([A[name] - start_A[name] for name in names]).flatten(1)
        gradient = torch.stack([gradients[name] for name in names]).flatten(1)
        figures = {
            "relative_drift": (update[1:] - update[:-1]).square().sum() / update.square().sum(),
            "update_cosine": cosine_similarity(update[1:], update[:-1]).mean(),
            "moved_A_cosine": cosine_similarity(moved[1:], moved[:-1]).mean(),
            "gradient_cosine": cosine_similarity(gradient[1:], gradient[:-1]).mean(),
            "first_singular_share": (singular[:, 0].square() / singular.square().sum(1)).mean(),
        }
        for name, value in figures.items():
            sums[name] = sums.get(name, 0.0) + value.item() / len(kinds)
    return {name: round(value, 4) for name, value in sums.items()}
