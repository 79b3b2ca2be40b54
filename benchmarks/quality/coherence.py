"""Where depth is coherent: what SmolLM2's layers read from the residual stream and write to it, under LoRA and StructLoRA.

    python -m benchmarks.quality.coherence --steps 40          print the table
    python -m benchmarks.quality.coherence --steps 40 --keep   and keep its figures for the report

All linear modules are adapted. The table has a row for each kind and `stream_cosine` of depths that are neighbours, of those
in the later half of the model, and of depths that are five apart.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from structlora_trl.core.diagnostics import stream_cosine

from . import language
from .methods import METHODS, Method
from .tables import coherence
from .tasks import CHAT_LINEAR

# A map that changes nothing, which keeps A₀: plain LoRA, with what the figure needs.
COMPARED = {
    "LoRA": Method("LoRA", structlora={"filter": "none", "coordinator": "none"}),
    "without coordinator": METHODS["no-align"],
    "StructLoRA": METHODS["structlora"],
}
FAR = 5
KEPT = Path(__file__).with_suffix(".json")


def cosines(runtime) -> dict[str, list[float]]:
    """Of each kind by its last name: neighbours, neighbours in the later half, depths `FAR` apart."""
    found = {}
    for m, factors in zip(runtime.maps, runtime.evaluation_factors(), strict=True):
        pair = m.stream_factors(factors)
        near, far = stream_cosine(*pair), stream_cosine(*pair, apart=FAR)
        found[m.kind.name.rsplit(".", 1)[-1]] = [x.nanmean().item() for x in (near, near[len(near) // 2 :], far)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        _, _, ours = language.train(method, training, *settings, targets=CHAT_LINEAR)
        by_kind = cosines(ours.runtime)
        found[name] = {kind: [round(x, 4) for x in by_kind[kind]] for kind in CHAT_LINEAR}
        if options.keep:  # after each, since a run takes minutes
            KEPT.write_text(json.dumps(found, indent=1) + "\n")
    print(coherence(found))


if __name__ == "__main__":
    main()
