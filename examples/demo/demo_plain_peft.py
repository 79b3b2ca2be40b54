"""Load an adapter that StructLoRA trained with plain PEFT, where `structlora_trl` cannot be imported, and score it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from demo_assets import load_sentences
from demo_task import evaluate, load_base
from peft import PeftModel

PACKAGE = "structlora_trl"


def block(package: str) -> None:
    """Make every later import of the package fail, and show that it does."""
    sys.modules[package] = None
    try:
        __import__(package)
    except ImportError as error:
        print(f"    import {package} -> {type(error).__name__}: {error}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("result", type=Path)
    options = parser.parse_args()
    loaded = [name for name in sys.modules if name.partition(".")[0] == PACKAGE]
    if loaded:
        raise SystemExit(f"{', '.join(loaded)} already imported: this would prove nothing")
    block(PACKAGE)
    _, held_out = load_sentences()
    model, tokenizer = load_base()
    model = PeftModel.from_pretrained(model, options.adapter)
    options.result.write_text(json.dumps(evaluate(model, tokenizer, held_out)))


if __name__ == "__main__":
    main()
