"""Directions of a trained adapter cut after training, without further steps: what `structlora export --keep 0.25` does.

| rule | keeps the directions of | needs |
|---|---|---|
| openness | most open gates, as trained | `structlora_gates.safetensors` |
| openness-singular | each update, in which directions count by openness: `export --keep` | `structlora_gates.safetensors` |
| information | largest Fisher information, among the directions as trained | rows |
| information-singular | the same among each module's singular directions: `export --keep --data` | rows |
| singular | `export --keep` of an adapter that has no gates | nothing |
| norm | largest ‖A[j, :]‖ ‖B[:, j]‖, as trained | nothing |
| random | chance | nothing |
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace

import torch
from peft import PeftModel
from torch import Tensor

from structlora_trl import Runtime, save_gates
from structlora_trl.core.selection import best
from structlora_trl.shrink.base_model import factors_of, put
from structlora_trl.shrink.load_adapter import Saved, read_saved
from structlora_trl.shrink.measuring import gate_information
from structlora_trl.shrink.peft_scaling import with_singular_directions
from structlora_trl.shrink.pruning import Pruned, select

from .tasks import Split

SHARES = {"quarter": 1 / 4}
EXAMPLES = 64  # that the information is of, as `structlora export` takes them
RULES = (
    "openness",
    "openness-singular",
    "information",
    "information-singular",
    "singular",
    "norm",
    "random",
)


def cut(
    model: PeftModel, runtime: Runtime, training: Split, seed: int, test: Callable[[], dict]
) -> dict[str, dict]:
    """Return test figures after a cut by each rule to each share of all directions. The adapter is left cut.

    Args:
        model (`PeftModel`): in evaluation mode, with one LoRA adapter.
        runtime (`Runtime`): which trained it, detached.
        training (`Split`): examples that it was trained on.
        seed (`int`): of what is drawn.
        test (`Callable`): () -> figures of the model as it stands then.

    Returns:
        rule -> name of the share -> accuracy and NLL.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        save_gates(runtime, folder)
        saved = read_saved(folder)
    rows = [training[torch.tensor([i])] for i in range(min(EXAMPLES, len(training)))]
    rows = [{**row.inputs, "labels": row.labels} for row in rows]
    factors = {m: (f["A"].detach().clone(), f["B"].detach().clone()) for m, f in factors_of(model).items()}
    generator = torch.Generator().manual_seed(seed + 3_000_000)
    as_trained = {
        "openness": saved.openness,
        "information": {m: x[0] for m, x in gate_information(model, rows).items()},
        "norm": {m: A.norm(dim=1) * B.norm(dim=0) for m, (A, B) in factors.items()},
        "random": {m: torch.rand(len(A), generator=generator) for m, (A, _) in factors.items()},
    }
    put(model, with_singular_directions(saved.lora, saved.tensors)[0])
    singular = gate_information(model, rows)
    found = {}
    for rule in RULES:
        found[rule] = {}
        for name, share in SHARES.items():
            if rule in as_trained:
                pruned = _best(saved, as_trained[rule], share)
            elif rule == "information-singular":
                pruned = select(saved, share, singular)
            else:
                gates = saved.openness if rule == "openness-singular" else None
                pruned = select(replace(saved, openness=gates), share)
            put(model, pruned.masked())
            figures = test()
            found[rule][name] = {figure: figures[figure] for figure in ("accuracy", "nll")}
    return found


def _best(saved: Saved, scores: dict[str, Tensor], share: float) -> Pruned:
    """Keep the directions of the highest scores, module -> (r,), over the model, as they were trained."""
    mask = best(torch.cat([*scores.values()]).double(), share)
    parts = mask.split([len(values) for values in scores.values()])
    return Pruned(saved.lora, saved.tensors, {m: part[None] for m, part in zip(scores, parts, strict=True)})
