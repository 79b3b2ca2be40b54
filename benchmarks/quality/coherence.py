"""Where depth is coherent: what SmolLM2's layers read from the residual stream and write to it, under LoRA and StructLoRA.

    python -m benchmarks.quality.coherence --steps 40          print the table
    python -m benchmarks.quality.coherence --steps 40 --keep   and keep its figures for the report

All linear modules are adapted. The table has a row for each kind, and `stream_cosine` (`structlora_trl.core.diagnostics`) of
depths that are neighbours, of those in the later half of the model, and of depths that are five apart.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainerCallback

from structlora_trl.core.diagnostics import stream_cosine, stream_products

from . import language
from .measures import kind_of, lora_factors
from .methods import METHODS
from .tables import coherence
from .tasks import CHAT_LINEAR

COMPARED = {
    "LoRA": METHODS["lora"],
    "StructLoRA": METHODS["structlora"],
}
WRITERS = ("o_proj", "down_proj")  # of the residual stream; the others read it
FAR = 5
KEPT = Path(__file__).with_suffix(".json")


class Start(TrainerCallback):
    """Keeps lora_A as it was before the first step, by module name."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.A = {name: A.detach().clone() for name, (A, _) in lora_factors(model).items()}


def cosines(model, start_A: dict[str, Tensor]) -> dict[str, list[float]]:
    """Of each kind by its last name: neighbours, neighbours in the later half, depths `FAR` apart.

    The update is what training has added: BA for a writer, B(A - A₀) for a reader, whose random A₀ would outweigh the rest.
    """
    kinds: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, (A, B) in lora_factors(model).items():
        leaf = kind_of(name).rsplit(".", 1)[-1]
        pair = (B.mT, A) if leaf in WRITERS else (A - start_A[name], B.mT)
        kinds.setdefault(leaf, []).append(tuple(factor.detach() for factor in pair))
    found = {}
    for leaf, pairs in kinds.items():
        side, other = (torch.stack(factors) for factors in zip(*pairs, strict=True))
        near, far = (stream_cosine(*stream_products(side, other, apart)) for apart in (1, FAR))
        found[leaf] = [x.nanmean().item() for x in (near, near[len(near) // 2 :], far)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in {"steps": 40, "examples": 320, "rank": 8, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--keep", action="store_true", help=f"write the figures to {KEPT.name}")
    options = parser.parse_args()

    pool, _, _ = language.LANGUAGE_TASKS["smollm-movie"].load()
    training = random.Random(options.seed).sample(pool, options.examples)
    settings = (options.rank, options.lr, options.seed, options.steps)
    found: dict[str, dict[str, list[float]]] = {}
    for name, method in COMPARED.items():
        start = Start()
        model, _, _ = language.train(method, training, *settings, targets=CHAT_LINEAR, callbacks=[start])
        by_kind = cosines(model, start.A)
        found[name] = {kind: [round(x, 4) for x in by_kind[kind]] for kind in CHAT_LINEAR}
        if options.keep:  # after each, since a run takes minutes
            KEPT.write_text(json.dumps(found, indent=1) + "\n")
    print(coherence(found))


if __name__ == "__main__":
    main()
