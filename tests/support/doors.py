"""What the tests of all front doors share: a tiny model and data on disk, the real command, and what it must leave behind."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from structlora_trl import attach, load_state
from tests.support.data import picture as pixels_of
from tests.support.launching import BIN, ROOT
from tests.support.left import assert_acted
from tests.support.tiny import DATA, sentence

STUBS = Path(__file__).with_name("stubs")
STEPS = 3
ROWS = 16


def save_rows(file: Path, row) -> str:
    file.write_text(json.dumps([row(i) for i in range(ROWS)]))
    return str(file)


def instruction(i: int) -> dict:
    return {"instruction": sentence(i, 4), "input": "", "output": sentence(i + 1, 4)}


def save_pictures(file: Path) -> str:
    """Chats about pictures, as JSON with the pictures' paths."""
    rows = []
    for i in range(ROWS):
        picture = file.with_name(f"picture{i}.png")
        Image.fromarray(pixels_of(i)).save(picture)
        question = [{"type": "image", "path": str(picture)}, {"type": "text", "text": sentence(i, 4)}]
        answer = [{"type": "text", "text": sentence(i + 1, 4)}]
        rows.append(
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        )
    file.write_text(json.dumps(rows))
    return str(file)


def run(*command, succeeds: bool = True, input: str | None = None, **environment) -> str:
    """Run a command of this environment; its output. Paths of this checkout and of the stubs come first."""
    command = [str(BIN / command[0]), *map(str, command[1:])]
    paths = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(STUBS)]),
        "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]),
    }
    variables = {**os.environ, **paths, "AXOLOTL_DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=variables, input=input)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == succeeds, output[-6000:]
    return output


def state_of(output: Path, step: int = STEPS) -> tuple[dict, dict]:
    """The options and the tensors of a checkpoint's state, whose parts have moved."""
    return assert_acted(Path(output) / f"checkpoint-{step}", step)


def check(
    output: Path, model: str, step: int = STEPS, merged: Path | None = None, atol: float = 1e-6
) -> dict:
    """StructLoRA acted, and what was saved is a plain LoRA adapter that computes what it computed; the state's options.

    The adapter (and the merged model) in plain PEFT is held to the checkpoint's, with which the state goes on.
    """
    options, state = state_of(output, step)
    loaded = PeftModel.from_pretrained(_base(model), output).eval()
    checkpoint = Path(output) / f"checkpoint-{step}"
    again = PeftModel.from_pretrained(_base(model), checkpoint, is_trainable=True)
    optimizer = torch.optim.SGD([p for p in again.parameters() if p.requires_grad], lr=0.0)
    runtime = attach(again, optimizer, options, **DATA)
    load_state(runtime, checkpoint)
    runtime.detach()
    tokens = torch.arange(4, 24).view(2, 10)
    models = {loaded: atol} | ({_base(merged): 10 * atol} if merged else {})  # W + sBA sums in another order
    with torch.no_grad():
        expected = again.eval()(input_ids=tokens).logits
        assert not torch.equal(expected, _base(model)(input_ids=tokens).logits)
        for one, allowed in models.items():
            torch.testing.assert_close(one(input_ids=tokens).logits, expected, atol=allowed, rtol=0)
    return {**options, "state": state}


def _base(folder):
    config = json.loads((Path(folder) / "config.json").read_text())
    auto = AutoModelForImageTextToText if config["model_type"] == "llava" else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()
