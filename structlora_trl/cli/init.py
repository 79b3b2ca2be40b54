"""`structlora init`: a YAML file to start from. Nothing heavy is imported for it."""

from __future__ import annotations

import textwrap
from dataclasses import fields
from typing import Any

import yaml

from ..config import StructLoRAConfig
from ..local_data import count_rows
from .arguments import parser_of
from .early import refuse_missing_model
from .main import TRAINING

_WIDTH = 110
_DESCRIPTION = """Print a YAML file for a training command: what a run has to name, on its first 20 lines. With --data, epochs and
held-out rows fit the number of rows. With --time, the run's first steps say how long it will take, and the file fits a machine
without a GPU. With --all, every option of StructLoRA follows, at its default.
`structlora COMMAND --help` lists what else may stand in the file.
"""
_EXAMPLES = """examples:
  structlora init > run.yaml                          # 250 rows of a public data set: edit it
  structlora init --data train.jsonl > run.yaml       # for rows of your own
  structlora init --data train.jsonl --time > run.yaml
  structlora init dpo --data pairs.jsonl --model ./my-model --all > run.yaml
"""
# Of each command: a public data set and its columns; a learning rate for LoRA, about ten times TRL's default, which is for
# all weights (of reward models, TRL's example); and lines of its own.
_TOKENS = "max_length: 1024  # tokens; longer rows are cut\n"
_BETA = "beta: 0.1  # how strongly the base model holds the adapter back\n"
_CHECKPOINTS = "checkpoints; --resume_from_checkpoint true continues from the last one"
_ONLINE = f"""reward_funcs: [accuracy_reward]  # names that TRL has, or import paths such as my_rewards.length
num_generations: 8  # completions of each prompt; they divide the batch
max_completion_length: 256  # tokens
num_train_epochs: 1  # the mean reward is logged; there is no held-out loss
save_steps: 100  # {_CHECKPOINTS}
"""
_PAIRS = ("trl-lib/ultrafeedback_binarized", "chosen and rejected, and perhaps prompt")
_PROMPTS = ("trl-lib/DeepMath-103K", "prompt, and what the reward functions read")
_METHODS = {
    "sft": ("trl-lib/Capybara", "messages, or prompt and completion, or text", 2e-4, _TOKENS),
    "dpo": (*_PAIRS, 1e-5, _BETA + _TOKENS),
    "kto": ("trl-lib/kto-mix-14k", "prompt, completion and label", 1e-5, _BETA + _TOKENS),
    "reward": (*_PAIRS, 1e-4, _TOKENS),
    "grpo": (*_PROMPTS, 1e-5, _ONLINE),
    "rloo": (*_PROMPTS, 1e-5, _ONLINE + "beta: 0.05  # weight of the KL to the base model\n"),
}
_FEW = f"""test_split_size: {{share}}  # of the {{rows:,}} rows, held out for the evaluation loss
num_train_epochs: {{epochs}}  # over the rest
eval_strategy: epoch
save_strategy: epoch  # {_CHECKPOINTS}
"""
_MANY = f"""test_split_size: 0.05  # share of the rows that is held out; 0.2 where rows are fewer than 500
num_train_epochs: 1  # over the rest; 3 to 5 where rows are few
eval_strategy: steps
eval_steps: 100
save_steps: 100  # {_CHECKPOINTS}
"""
_FIRST_ROWS = 250  # of a public data set, so that the file is an example of few rows and several epochs
_FILE = """# structlora {name} --config run.yaml
model_name_or_path: {model}  # a folder, or a model of the hub
dataset_name: {data}
{own}learning_rate: {rate}  # for LoRA; try half and twice as much
per_device_train_batch_size: 8
lora_r: 8  # rank: directions of each module
lora_alpha: 16  # updates are scaled by lora_alpha / lora_r
lora_target_modules: all-linear  # or a list, such as [q_proj, v_proj]
output_dir: out  # becomes a plain LoRA adapter
"""
_NO_GPU = "# use_cpu: true  # without a GPU; with `bf16: false`, which most CPUs compute faster\n"
_ON_CPU = "use_cpu: true\nbf16: false  # most CPUs compute fp32 faster\n"
_ON = (
    "structlora: true  # false: plain LoRA, with all else equal; `structlora init --all` lists the options\n"
)
_OPTIONS = (
    "\n# `structlora: false` in place of the block trains plain LoRA, with all else equal.\nstructlora:\n"
)


def run(command: str, arguments: list[str]) -> None:
    """Print the file.

    Raises:
        StructLoRAError: `--model` names no folder that is there; `--data` a file that is not there, cannot be read, or has
            rows that the command does not take; or `--time`, and the command refuses the file.
    """
    parser = parser_of(command, _DESCRIPTION, _EXAMPLES)
    parser.add_argument(
        "method", nargs="?", choices=[*TRAINING], default="sft", help="the training command (sft)"
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="rows to train on: a .jsonl, .json, .csv or .parquet file, or a hub name",
    )
    parser.add_argument(
        "--model", default="Qwen/Qwen3-0.6B", help="base model: a folder, or a model of the hub"
    )
    parser.add_argument(
        "--time", action="store_true", help="run three steps, and print what the run will take"
    )
    parser.add_argument("--all", action="store_true", help="list every option of StructLoRA")
    given = parser.parse_args(arguments)
    refuse_missing_model(given.model, "--model")
    text = template(given.method, given.data, given.model, given.all)
    if given.time:
        from . import timing  # torch and the rest

        text = text if timing.has_accelerator() else text.replace(_NO_GPU, _ON_CPU)
        text = timing.measure(given.method, text) + text
    print(text, end="")


def template(
    name: str, data: str | None = None, model: str = "Qwen/Qwen3-0.6B", all_options: bool = False
) -> str:
    """Return the text of the file, YAML, of one of the training commands.

    Args:
        name (`str`): of the command.
        data (`str`, *optional*): a file of rows, or a data set's name; None for the first rows of a public one.
        model (`str`, *optional*): the base model.
        all_options (`bool`, *optional*): whether every option of StructLoRA stands in it.

    Raises:
        StructLoRAError: the file of rows cannot be read, or has rows that the command does not take.
    """
    public, columns, rate, own = _METHODS[name]
    rows = _FIRST_ROWS if data is None else count_rows(data, name)
    if name in ("grpo", "rloo"):
        schedule = ""
    elif rows is not None and rows < 2000:
        share, epochs = (0.2, 5 if rows < 200 else 4) if rows < 500 else (0.1, 3)
        schedule = _FEW.format(share=share, epochs=epochs, rows=rows)
    else:
        schedule = _MANY
    if data is None:
        named = f"{public}  # or a .jsonl, .csv or .parquet file with {columns}"
        split = f"dataset_train_split: train[:{_FIRST_ROWS}]  # the first rows; 'train' takes all of yours\n"
        schedule = split + schedule if schedule else schedule
    text = _FILE.format(
        name=name,
        model=_value(model),
        data=named if data is None else _value(data),
        own=schedule + own,
        rate=_value(rate),
    )
    text += _NO_GPU
    if not all_options:
        return text + _ON
    options = ""
    for option in fields(StructLoRAConfig):
        comment = textwrap.wrap(" ".join(option.metadata["help"].split()), _WIDTH)
        options += "".join(f"# {line}\n" for line in comment) + f"{option.name}: {_value(option.default)}\n"
    return text + _OPTIONS + textwrap.indent(options, "  ")


def _value(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]
