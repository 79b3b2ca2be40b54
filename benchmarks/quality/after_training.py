"""Directions of a trained LoRA adapter cut after training, by rule and at equal size: what `structlora export --keep` does.

| rule | keeps the directions of |
|---|---|
| information | largest Fisher information of their gates on training examples, among each module's singular directions |
| held-out | the same on validation examples, which an overfitted model still has gradients on |
| singular | largest singular values of each module's scaled BA, over all modules together |
| norm | largest ‖A[j, :]‖ ‖B[:, j]‖, as trained (top-k norm) |
| random | chance, drawn once, as trained |
| random-singular | chance, drawn once, among the singular directions |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel
from torch import Tensor

from structlora_trl.adapters.measuring import gate_information
from structlora_trl.core.selection import best

from .measures import lora_factors, to_singular_directions
from .settings import SHARES
from .tasks import Split

# Half of the directions hardly costs anything, and each figure takes an evaluation.
AT_HALF = ("information", "random")
EXAMPLES = 64  # that the information is of, as `structlora export` takes them


def cut(
    model: PeftModel, training: Split, validation: Split, seed: int, test: Callable[[], dict]
) -> dict[str, dict]:
    """Test figures of a trained plain adapter after a cut by each rule to each share of all its directions.

    The adapter is left in its singular directions; its gradients are cleared.

    Args:
        model (`PeftModel`): in evaluation mode, with one LoRA adapter of one scale and nothing attached.
        training, validation (`Split`): examples that it was trained on, and others.
        seed (`int`): of what is drawn.
        test (`Callable`): () -> figures of the model as it stands then.

    Returns:
        rule -> name of the share -> accuracy and NLL.
    """
    generator = torch.Generator().manual_seed(seed + 3_000_000)
    factors = lora_factors(model)

    def chance() -> Tensor:
        return torch.rand(len(factors), next(iter(factors.values()))[0].shape[0], generator=generator)

    def norms() -> Tensor:
        return torch.stack([A.norm(dim=1) * B.norm(dim=0) for A, B in factors.values()]).detach()

    found = {
        rule: _at_shares(rule, factors, scores, test)
        for rule, scores in (("norm", norms()), ("random", chance()))
    }
    to_singular_directions(factors.values())
    scores = {
        "information": _information(model, training),
        "held-out": _information(model, validation),
        "singular": norms(),
        "random-singular": chance(),
    }
    return found | {rule: _at_shares(rule, factors, of_rule, test) for rule, of_rule in scores.items()}


def _information(model: PeftModel, split: Split) -> Tensor:
    """(M, r), of the first `EXAMPLES` of a split."""
    rows = [split[torch.tensor([i])] for i in range(min(EXAMPLES, len(split)))]
    each = [{**row.inputs, "labels": row.labels} for row in rows]
    return torch.cat([*gate_information(model, each).values()])


@torch.no_grad()
def _at_shares(
    rule: str, factors: dict[str, tuple[Tensor, Tensor]], scores: Tensor, test: Callable[[], dict]
) -> dict[str, dict]:
    """By share, figures with the best directions alone; `scores` is (M, r)."""
    whole = [B.detach().clone() for _, B in factors.values()]
    found = {}
    for name, share in SHARES.items():
        if name == "half" and rule not in AT_HALF:
            continue
        kept = best(scores.flatten(), share).view_as(scores)
        for (_, B), trained, of_module in zip(factors.values(), whole, kept, strict=True):
            B.copy_(trained * of_module)
        figures = test()
        found[name] = {figure: figures[figure] for figure in ("accuracy", "nll")}
    for (_, B), trained in zip(factors.values(), whole, strict=True):
        B.copy_(trained)
    return found
