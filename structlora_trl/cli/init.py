"""`structlora init`: a YAML file to start from. Nothing heavy is imported for it."""

from __future__ import annotations

import textwrap
from dataclasses import fields
from typing import Any

import yaml

from ..config import StructLoRAConfig
from .arguments import parser_of
from .main import TRAINING

_WIDTH = 110
_DESCRIPTION = """Print a YAML file for a training command: what a run has to name, and every option of StructLoRA at its
default. `structlora COMMAND --help` lists what else may stand in it.
"""
_EXAMPLES = """examples:
  structlora init > run.yaml
  structlora init grpo > run.yaml
"""
_HEAD = """# structlora {name} --config run.yaml
# For {what}. All other arguments of `trl {name}` may stand here too.
"""
_BLOCK = """
# StructLoRA. `structlora: false` in place of the block trains plain LoRA, with all else equal.
structlora:
"""
# Each learning rate is for LoRA: about ten times TRL's default, which is for all weights; of reward models,
# TRL's example.
_RATES = {"sft": 2e-4, "dpo": 1e-5, "kto": 1e-5, "reward": 1e-4, "grpo": 1e-5, "rloo": 1e-5}
_DATA = {
    "sft": ("trl-lib/Capybara", "with messages, or prompt and completion, or text"),
    "dpo": ("trl-lib/ultrafeedback_binarized", "with chosen and rejected, and perhaps prompt"),
    "kto": ("trl-lib/kto-mix-14k", "with prompt, completion and label"),
    "reward": ("trl-lib/ultrafeedback_binarized", "with chosen and rejected"),
    "grpo": ("trl-lib/DeepMath-103K", "with prompt, and what the reward functions read"),
    "rloo": ("trl-lib/DeepMath-103K", "with prompt, and what the reward functions read"),
}
_TOKENS = ("max_length", 1024, "tokens; longer rows are cut")
_ONLINE = [
    ("reward_funcs", ["accuracy_reward"], "names that TRL has, or import paths such as my_rewards.length"),
    ("eval_strategy", "no", "the mean reward is logged; there is no held-out loss"),
    ("num_generations", 8, "completions of each prompt; they divide the batch"),
    ("max_completion_length", 256, "tokens"),
]
_EVALUATION = [
    ("test_split_size", 0.05, "share of the rows that is held out"),
    ("eval_strategy", "steps", "its loss is logged; 'no' needs no held-out rows"),
    ("eval_steps", 100, ""),
]
_OWN = {
    "sft": [_TOKENS, *_EVALUATION],
    "dpo": [("beta", 0.1, "how strongly the base model holds the adapter back"), _TOKENS, *_EVALUATION],
    "kto": [("beta", 0.1, "how strongly the base model holds the adapter back"), _TOKENS, *_EVALUATION],
    "reward": [_TOKENS, *_EVALUATION],
    "grpo": _ONLINE,
    "rloo": [*_ONLINE, ("beta", 0.05, "weight of the KL to the base model")],
}


def run(command: str, arguments: list[str]) -> None:
    """Print the file."""
    parser = parser_of(command, _DESCRIPTION, _EXAMPLES)
    parser.add_argument(
        "method", nargs="?", choices=[*TRAINING], default="sft", help="the training command (sft)"
    )
    print(template(parser.parse_args(arguments).method), end="")


def template(name: str) -> str:
    """The text of the file, YAML, of one of the training commands."""
    data, columns = _DATA[name]
    settings = [
        ("model_name_or_path", "Qwen/Qwen3-0.6B", "a folder, or a model of the hub"),
        ("dataset_name", data, f"or local data, {columns}"),
        ("output_dir", "out", "becomes a plain LoRA adapter"),
        ("lora_r", 8, "rank: directions of each module"),
        ("lora_alpha", 16, "updates are scaled by lora_alpha / lora_r"),
        ("lora_target_modules", "all-linear", "or a list, such as [q_proj, v_proj]"),
        ("learning_rate", _RATES[name], ""),
        ("per_device_train_batch_size", 8, ""),
        ("num_train_epochs", 1, ""),
        ("save_steps", 100, "checkpoints; --resume_from_checkpoint true continues from the last one"),
        *_OWN[name],
    ]
    lines = [
        f"{key}: {_value(value)}" + (f"  # {comment}" if comment else "") for key, value, comment in settings
    ]
    lines.append("# use_cpu: true  # without a GPU")
    options = ""
    for option in fields(StructLoRAConfig):
        comment = textwrap.wrap(" ".join(option.metadata["help"].split()), _WIDTH)
        options += "".join(f"# {line}\n" for line in comment) + f"{option.name}: {_value(option.default)}\n"
    return (
        _HEAD.format(name=name, what=TRAINING[name])
        + "\n".join(lines)
        + "\n"
        + _BLOCK
        + textwrap.indent(options, "  ")
    )


def _value(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]
