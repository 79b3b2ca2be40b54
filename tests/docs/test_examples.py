"""Each script under examples/, run word for word: where it names a public model or data set, a folder of that name is at hand."""

from __future__ import annotations

import re
import runpy
import sys
from dataclasses import dataclass, field
from importlib.metadata import requires
from pathlib import Path

import pytest
import trl
from datasets import Dataset, Features, Image, List, Value
from packaging.version import Version

from structlora_trl import StructLoRACallback
from structlora_trl.state import STATE_NAME
from tests.support import data
from tests.support.cli_runs import assert_plain_peft_agrees
from tests.support.launching import ROOT
from tests.support.left import assert_acted
from tests.support.readme import code_blocks
from tests.support.tiny import FAMILIES, sentence

EXAMPLES = ROOT / "examples"
ROWS = 12
pytestmark = pytest.mark.usefixtures("place")


def chats() -> Dataset:
    return Dataset.from_list(data.chats(ROWS))


def preferences() -> Dataset:
    return Dataset.from_list(data.preferences(ROWS))


def pictures() -> Dataset:
    message = List({"role": Value("string"), "content": Value("string")})
    features = Features({"images": List(Image()), "prompt": message, "completion": message})
    return Dataset.from_list(data.pictures(ROWS), features=features)


# Those that no machine without a GPU and a server can run, and the test of what is ours in them.
SERVED = {"async_grpo": "tests/trainers/test_vllm_sync.py"}


@dataclass
class Example:
    """What a script needs to run here, and what it leaves."""

    model: str  # the public name
    family: str  # the tiny one that stands for it
    output: str  # the folder it saves its adapter to
    data: dict = field(default_factory=dict)  # name -> rows
    trl: str = "0.24"  # first version that runs it beside transformers 5
    needs: str | None = None  # an optional package
    sizes: dict = field(default_factory=dict)  # where the tiny model is too tiny
    after: str | None = None  # the script that makes its input
    steps: int = 3


CHATS = {"trl-lib/Capybara": chats}
PREFERENCES = {"trl-lib/ultrafeedback_binarized": preferences}
TABLE = {
    "sft_callback": Example("Qwen/Qwen3-0.6B", "qwen3", "qwen3-sft", CHATS, steps=60),
    "sft_trainer": Example("HuggingFaceTB/SmolLM2-360M-Instruct", "llama", "smollm2-sft", CHATS, steps=60),
    "dpo": Example("Qwen/Qwen3-0.6B", "qwen3", "qwen3-dpo", PREFERENCES, trl="1.0"),
    "reward_mixin": Example("Qwen/Qwen3-0.6B", "qwen3", "qwen3-reward", PREFERENCES, trl="1.0"),
    "qlora": Example(
        "Qwen/Qwen3-8B",
        "qwen3",
        "qwen3-qlora",
        CHATS,
        needs="bitsandbytes",
        sizes=data.BLOCKS_OF_64,
        steps=60,
    ),
    "llava": Example(
        "llava-hf/llava-1.5-7b-hf", "llava", "llava-sft", {"trl-lib/llava-instruct-mix": pictures}
    ),
    "sequence_classification": Example(
        "google-bert/bert-base-uncased",
        "bert",
        "bert-imdb",
        {
            "stanfordnlp/imdb": lambda: Dataset.from_list(
                [{"text": sentence(i), "label": i % 2} for i in range(3 * 16)]
            )
        },
    ),
    "pytorch_loop": Example(
        "HuggingFaceTB/SmolLM2-135M",
        "llama",
        "smollm2-quotes",
        {"Abirate/english_quotes": lambda: Dataset.from_list([{"quote": sentence(i)} for i in range(3 * 8)])},
        steps=15 * 3,
    ),
    "serve": Example("Qwen/Qwen3-0.6B", "qwen3", "qwen3-sft", CHATS, after="sft_callback", steps=60),
}


def run(name: str) -> dict:
    """Run a script in the present directory; its variables."""
    example = TABLE[name]
    if example.after:
        run(example.after)
    data.save_base(example.model, example.family, **example.sizes)
    for name_of_data, rows in example.data.items():
        Path(name_of_data).mkdir(parents=True, exist_ok=True)
        rows().to_parquet(Path(name_of_data) / "train.parquet")
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_every_script_has_a_row_and_a_line_in_the_index():
    listed = re.findall(r"\]\((\w+)\.py\)", (EXAMPLES / "README.md").read_text())
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(listed) == {*TABLE, *SERVED, "inspect_app"}
    assert all((ROOT / test).is_file() for test in SERVED.values())


@pytest.mark.parametrize("path", EXAMPLES.glob("*.py"), ids=lambda path: path.stem)
def test_script_names_the_packages_that_it_imports(path):
    """Its inline metadata (PEP 723), which `uv run` installs; the rest comes with structlora-trl."""
    text = path.read_text(encoding="utf-8")
    block = re.match(r"# /// script\n((?:#.*\n)+)# ///\n", text)[1]
    named = set(re.findall(r'"([\w-]+)(?:\[\w+\])?"', re.search(r"dependencies = \[.*\]", block)[0]))
    ours = {re.match(r"[\w-]+", line)[0] for line in requires("structlora-trl") if "extra ==" not in line}
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)) - sys.stdlib_module_names
    assert "structlora-trl" in named and not imported - ours - named - {"structlora_trl"}


def test_inspect_app_shows_the_report():
    gradio = pytest.importorskip("gradio")
    run("sft_callback")
    report = runpy.run_path(str(EXAMPLES / "inspect_app.py"))["report"]
    assert "q_proj" in report(TABLE["sft_callback"].output)
    with pytest.raises(gradio.Error, match="no folder nothing"):
        report("nothing")


@pytest.mark.parametrize("name", TABLE)
def test_example(name):
    example = TABLE[name]
    if Version(trl.__version__) < Version(example.trl):
        pytest.skip(
            f"TRL {trl.__version__} cannot run this beside transformers 5, with or without StructLoRA"
        )
    if example.needs:
        pytest.importorskip(example.needs)
    variables = run(name)

    (state_file,) = Path(example.output).rglob(STATE_NAME)
    assert_acted(state_file.parent, example.steps)

    trained = variables["trainer"].model if "trainer" in variables else variables["model"]
    assert trained.peft_config["default"].base_model_name_or_path == example.model
    assert_plain_peft_agrees(trained, example.output, example.family, variables.get("MERGED"))


# Page -> blocks of Python in it. Readers paste them: a block defines all that it uses, or the page explains it.
PASTED = {"README.md": 1, "docs/index.md": 1, "docs/quickstart.md": 3}
EXPLAINED = {"docs/quickstart.md": {"loader": [FAMILIES["qwen3"].batch(i) for i in range(2)]}}


@pytest.mark.parametrize(
    "page, index", [(page, index) for page, count in PASTED.items() for index in range(count)]
)
def test_pasted_block_runs(page, index):
    blocks = code_blocks(page, "python")
    assert len(blocks) == PASTED[page]
    if Version(trl.__version__) < Version("1.0") and "DPOTrainer" in blocks[index]:
        pytest.skip(
            f"TRL {trl.__version__} cannot import DPO beside transformers 5, with or without StructLoRA"
        )
    data.save_base("Qwen/Qwen3-0.6B", "qwen3")
    Path("trl-lib/Capybara").mkdir(parents=True)
    chats().to_parquet("trl-lib/Capybara/train.parquet")
    explained = EXPLAINED.get(page, {})
    assert all(f"`{name}`" in (ROOT / page).read_text(encoding="utf-8") for name in explained)
    variables = {**explained}
    exec(compile(blocks[index], page, "exec"), variables)
    if "trainer" in variables:
        callbacks = variables["trainer"].callback_handler.callbacks
        (runtime,) = (callback.runtime for callback in callbacks if isinstance(callback, StructLoRACallback))
        # A task for which this is made: few rows, and gates.
        (rows,) = re.findall(r"split=\"train\[:(\d+)\]\"", blocks[index])
        assert int(rows) < 500 and runtime.gating
    else:
        runtime = variables["runtime"]
    assert (runtime.step > 0) == ("train()" in blocks[index])
