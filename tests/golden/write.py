"""Write state files of the present format, for the tests of later versions: `python -m tests.golden.write format-4`.

Each run leaves its state after three steps, and its evaluation weights beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file

from structlora_trl import attach, save_state
from tests.support.tiny import FAMILIES, adamw, lora_parameters, peft_model, train

GOLDEN = Path(__file__).parent
STEPS = 3
# Semantic edges alone, and all of them drawn: so that each option of the graph changes something in three steps.
OPTIONS = {
    "edges": "similarity",
    "semantic_every": 2,
    "semantic_threshold": -0.99,
    "semantic_top_k": 1,
    "seed": 3,
}
# The model and the options of each run: plain modules, experts that are modules, experts in one parameter.
GOLDEN_RUNS = {
    "modules": ({"family": "llama", "rank": 2}, {"side": "both", "head_gates": True}),
    "experts": (
        {"family": "mixture", "rank": 2, "targets": ["gate_proj", "down_proj"]},
        {"expert_gates": True},
    ),
    "stacked": ({"family": "qwen3_moe", "rank": 2, "targets": FAMILIES["qwen3_moe"].linear}, {}),
}


def main():
    for name, (model, options) in GOLDEN_RUNS.items():
        folder = GOLDEN / sys.argv[1] / name
        adapted = peft_model(**model)
        optimizer = adamw(adapted)
        runtime = attach(adapted, optimizer, {**OPTIONS, **options})
        train(adapted, model["family"], optimizer, STEPS)
        save_state(runtime, folder)
        weights = {name: p.detach().clone() for name, p in lora_parameters(adapted).items()}
        save_file(weights, folder / "weights.safetensors")


if __name__ == "__main__":
    main()
