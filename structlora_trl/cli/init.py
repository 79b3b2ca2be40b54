"""`structlora init`: a YAML file to start from, its comments and values from the dataclasses that read it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import Any

import yaml

from ..config import StructLoRAConfig
from .methods import METHODS, Method
from .parser import parser_of

_WIDTH = 110
_DESCRIPTION = """Print a YAML file for a training command: what a run has to name, and every option of StructLoRA at its default.

`structlora COMMAND --help` lists what else may stand in it.
"""
_EXAMPLES = """examples:
  structlora init > run.yaml
  structlora init grpo > run.yaml
"""
_HEAD = """# structlora {name} --config run.yaml
# {what} with a LoRA adapter and StructLoRA. All other arguments of `trl {name}` may stand here too.
"""
_BLOCK = (
    "# StructLoRA. `structlora: false` in place of the block trains plain LoRA, with all else equal.\nstructlora:\n"
)
# What TRL has no default for, or one that no run wants.
_VALUES = {
    "model_name_or_path": "Qwen/Qwen3-0.6B",
    "output_dir": "out",
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "reward_funcs": ["accuracy_reward"],
    "num_train_epochs": 1,
}
# TRL's defaults are for all weights; its guides and examples take about ten times as much with LoRA.
_LORA_LEARNING_RATE = 10
_DATA = {
    "sft": "trl-lib/Capybara",
    "kto": "trl-lib/kto-mix-14k",
    "grpo": "trl-lib/DeepMath-103K",
    "rloo": "trl-lib/DeepMath-103K",
}
_PREFERENCES = "trl-lib/ultrafeedback_binarized"
_RUN = (
    *("model_name_or_path", "dataset_name", "output_dir", "lora_r", "lora_alpha", "lora_target_modules"),
    *("learning_rate", "per_device_train_batch_size", "num_train_epochs"),
)
_ONLINE = ("reward_funcs", "num_generations", "max_completion_length", "beta")
_OWN = {"sft": ("max_length",), "dpo": ("beta", "max_length"), "kto": ("beta", "max_length"), "reward": ("max_length",)}


def run(command: str, arguments: list[str]) -> None:
    """Print the file.

    Raises:
        StructLoRAError: this TRL cannot import the trainer.
    """
    parser = parser_of(command, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("method", nargs="?", choices=[*METHODS], default="sft", help="the training command (sft)")
    print(template(METHODS[parser.parse_args(arguments).method]), end="")


def template(method: Method) -> str:
    """The text of the file, YAML.

    Raises:
        StructLoRAError: this TRL cannot import the trainer.
    """
    _, classes = method.load()
    known = {f.name: f for c in classes for f in fields(c)}
    rate = float(f"{_LORA_LEARNING_RATE * _default(known['learning_rate']):.2g}")
    data = _DATA.get(method.name, _PREFERENCES)
    values = {**_VALUES, "learning_rate": rate, "dataset_name": data}
    names = (*_RUN, *_OWN.get(method.name, _ONLINE))
    run_lines = _entries((known[name], values.get(name, _default(known[name]))) for name in names if name in known)
    options = _entries((f, f.default) for f in fields(StructLoRAConfig))
    return _HEAD.format(name=method.name, what=method.what) + run_lines + "\n" + _BLOCK + textwrap.indent(options, "  ")


def _default(option: Field) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


def _entries(options: Iterable[tuple[Field, Any]]) -> str:
    """Each option after its help, one comment of whole lines."""
    text = ""
    for option, value in options:
        comment = " ".join(option.metadata.get("help", "").replace("%%", "%").split())
        text += "".join(f"# {line}\n" for line in textwrap.wrap(comment, _WIDTH))
        text += f"{option.name}: {yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]}\n"
    return text
