"""Forms of adapter that `structlora export` writes, as GGUF files in llama.cpp's server: log-probabilities beside those of PEFT.
`make test-llamacpp` runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from structlora_trl.shrink.load_adapter import read_saved
from structlora_trl.shrink.servers import told

from .forms import REFUSED, TOKENS, ask, assert_refused, difference, in_peft, prompts, served_two_at_once

LLAMACPP = os.environ.get("STRUCTLORA_LLAMACPP")  # a folder with llama.cpp's converters and `xllamacpp`
pytestmark = pytest.mark.skipif(
    LLAMACPP is None, reason="STRUCTLORA_LLAMACPP names no folder: `make test-llamacpp`"
)
RIGHT = (
    "as-peft-saved-it",
    "one-rank",
    "one-rank-distilled",
    "a-quarter-filled-up",
    "for-llamacpp",
    "scaled",
    "pruned-for-lorax",
    "for-lorax",
    "bfloat16",
)
WRONG = ("patterns", "a-quarter-of-many-ranks")  # loaded, and scaled by what PEFT does not scale by

# GGUF files of the base model, in full precision, and of each adapter. Prints the adapters at which the converter stopped.
CONVERT = """
import runpy, sys
llamacpp, base, folder, *names = sys.argv[1:]
sys.argv = ["", base, "--outtype", "f32", "--outfile", f"{folder}/base.gguf"]
runpy.run_path(f"{llamacpp}/convert_hf_to_gguf.py", run_name="__main__")
for name in names:
    sys.argv = ["", f"{folder}/{name}", "--base", base, "--outfile", f"{folder}/{name}.gguf"]
    try:
        runpy.run_path(f"{llamacpp}/convert_lora_to_gguf.py", run_name="__main__")
    except (SystemExit, ValueError):
        print(name)
"""
# llama.cpp's server with every adapter, none of which acts unless a request names it. It ends when its input does.
SERVE = """
import sys, xllamacpp
options = xllamacpp.CommonParams()
options.model.path, *adapters = sys.argv[1:]
options.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in adapters]
options.lora_init_without_apply, options.n_ctx, options.n_parallel = True, 256, 2
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1  # threads that wait would spin
options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(options)
print("at", server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def converted(base, adapters) -> tuple[Path, list[str]]:
    """The folder, with GGUF files, and the names of adapters at which the converter stopped."""
    command = [sys.executable, "-c", CONVERT, LLAMACPP, base, adapters, *RIGHT, *WRONG, *REFUSED]
    environment = {**os.environ, "PYTHONPATH": LLAMACPP}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return adapters, done.stdout.split()


@pytest.fixture(scope="module")
def server(converted):
    """The address of the server with all adapters."""
    folder, _ = converted
    files = [folder / f"{name}.gguf" for name in ("base", *RIGHT, *WRONG)]
    environment = {**os.environ, "PYTHONPATH": LLAMACPP}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SERVE, *files], env=environment, **pipes) as process:
        address = next(line.split()[1] for line in process.stdout if line.startswith("at "))
        yield address
        process.stdin.close()


def served(address: str, name: str, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Tokens of a greedy continuation, and their log-probabilities."""
    lora = [{"id": (*RIGHT, *WRONG).index(name), "scale": 1.0}]
    body = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "n_probs": 1, "lora": lora}
    steps = json.loads(ask(f"{address}/completion", body))["completion_probabilities"]
    return [step["id"] for step in steps], [step["logprob"] for step in steps]


def test_what_export_writes_is_served_as_peft_computes_it_two_at_once(server, base, adapters):
    ids = prompts(base)
    found = served_two_at_once((*RIGHT, *WRONG), lambda name, text: served(server, name, ids[text]))
    for name, of_name in found.items():
        wanted, bare = in_peft(base, adapters / name, of_name)
        assert difference(of_name, bare) > 0.05, name
        if name in RIGHT:  # llama.cpp's kernels round more than PyTorch's
            assert difference(of_name, wanted) < 0.02, name
        else:
            assert difference(of_name, wanted) > 0.1, name


@pytest.mark.parametrize("name", WRONG)
def test_what_it_would_scale_wrongly_is_told(name, adapters):
    saved = read_saved(adapters / name)
    assert "--for llamacpp" in told(saved.lora, saved.tensors)["llama.cpp"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_we_say_it_cannot_load_the_converter_stops_at(name, converted):
    folder, stopped = converted
    assert_refused(folder / name, "llamacpp", "llama.cpp")
    assert name in stopped
