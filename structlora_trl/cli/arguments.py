"""The arguments of a training command: TRL's own, from a YAML file and the command line, and StructLoRA's beside them."""

from __future__ import annotations

import argparse
import difflib
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from ..config import StructLoRAConfig
from ..errors import StructLoRAError
from ..options import read_options, read_switch
from ..refusing import refusing
from .launch import LaunchArguments
from .methods import Method

_DESCRIPTION = """{what}, training a LoRA adapter with StructLoRA.

Takes the arguments of `trl {method}`, in a YAML file (--config), on the command line, or both; the command line wins.
StructLoRA's options go under the key `structlora:` of the file, as in Axolotl and LLaMA-Factory (`structlora: false` is plain
LoRA). Those whose name no argument of `trl {method}` has may also be keys of their own, and arguments of the command line: all
but {taken}. They are the last group below. LoRA is always on (lora_r, lora_alpha, lora_target_modules, ...).
dataset_name may be a .json, .jsonl, .csv or .parquet file, a folder of them, or a data set of the hub.

Arguments of `accelerate launch` (--num_processes, ...) start processes, and so does --accelerate_config with a file that
`accelerate config` writes or one of TRL's names (multi_gpu, zero1, zero2, zero3, fsdp2). Each may be a key of the file too.
"""
_EXAMPLES = """examples:
  structlora init {method} > run.yaml     # a file to start from
  structlora {method} --config run.yaml
  structlora {method} --config run.yaml --gate_init 0.8 --learning_rate 1e-4
  structlora {method} --config run.yaml --structlora false          # plain LoRA, all else equal
  structlora {method} --model_name_or_path Qwen/Qwen3-0.6B --dataset_name data.jsonl --output_dir out --load_in_4bit
  structlora {method} --config run.yaml --accelerate_config zero2 --num_processes 4
  torchrun --nproc_per_node 8 -m structlora_trl.cli {method} --config run.yaml
"""


class Arguments(NamedTuple):
    """What a training command was given."""

    structlora: StructLoRAConfig | None  # None: plain LoRA
    script: ScriptArguments
    training: Any  # SFTConfig, DPOConfig, ...
    model: ModelConfig
    mixture: DatasetMixtureConfig
    launcher: list[str]  # what is for `accelerate launch`
    without_launcher: list[str]  # the rest of the command line


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def parse(method: Method, classes: tuple[type, ...], arguments: list[str]) -> Arguments:
    """Read a training command's arguments.

    Args:
        method (`Method`): the command.
        classes (`tuple` of types): the dataclasses that its arguments are of.
        arguments (`list[str]`): the command line after the command.

    Raises:
        StructLoRAError: a YAML file that is missing, broken or has an unknown key; or a value that is refused.
        SystemExit: `--help`, or an unknown argument on the command line.
    """
    taken = {f.name for f in fields(StructLoRAConfig)} & {f.name for c in classes for f in fields(c)}
    parser = TrlParser(
        (_beside(taken), *classes),
        prog=f"structlora {method.name}",
        usage=f"structlora {method.name} --config run.yaml [--any_argument value]",
        description=_DESCRIPTION.format(
            method=method.name, what=method.what, taken=", ".join(f"`{name}`" for name in sorted(taken))
        ),
        epilog=_EXAMPLES.format(method=method.name),
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(use_peft=True)
    parser.set_defaults(lora_task_type=method.lora_task_type)
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    launch_arguments = LaunchArguments({flag for action in parser._actions for flag in action.option_strings})
    arguments, launcher = launch_arguments.split(arguments)
    _refuse_unknown_flags(parser, launch_arguments.names, arguments)
    file = _read_file(parser, launch_arguments.names, arguments)
    block = read_options(file["structlora"]) if isinstance(file.get("structlora"), dict) else {}
    beside = {name: value for name, value in block.items() if name not in taken}
    _refuse_options_given_twice(beside, file)
    parser.set_defaults(**beside)
    with refusing("reading the arguments", f"values that `trl {method.name}` accepts", "correct the argument it names"):
        ours, *theirs, surplus = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    surplus = surplus[2 * len(launch_arguments.names & file.keys()) :]  # the file's come first, name and value
    if surplus:
        parser.error(f"unexpected {', '.join(map(repr, surplus))}; each value follows the --name of its argument")
    # A block is a yes; what stands in it has been read.
    is_on = isinstance(ours.structlora, dict) or read_switch(ours.structlora) is not None
    options = {**ours.options(), **{name: block[name] for name in taken & block.keys()}}
    config = StructLoRAConfig.build(options) if is_on else None
    return Arguments(config, *theirs, [*launch_arguments.of_file(file), *launcher], arguments)


def _beside(taken: set[str]) -> type:
    """`StructLoRAConfig` for a parser that has a trainer's arguments too, without the names that are taken."""
    types = get_type_hints(StructLoRAConfig)
    without = [
        (f.name, types[f.name], field(default=f.default, init=False))
        for f in fields(StructLoRAConfig)
        if f.name in taken
    ]
    switch = field(default=True, metadata={"help": "Train StructLoRA. 'false' trains plain LoRA, with all else equal."})
    return make_dataclass(
        "StructLoRAArguments",
        [*without, ("structlora", bool, switch)],
        bases=(StructLoRAConfig,),
        namespace={"_argument_group_name": "StructLoRA"},
    )


def _refuse_unknown_flags(parser: TrlParser, of_launcher: set[str], arguments: list[str]) -> None:
    known = {flag for action in parser._actions for flag in action.option_strings}
    known |= {f"--{name}" for name in of_launcher}
    for argument in arguments:
        name = argument.split("=")[0]
        if name.startswith("--") and name not in known | {"--config"}:
            near = difflib.get_close_matches(name, sorted(known), 1)
            parser.error(f"unknown argument {name}" + (f" (did you mean {near[0]}?)" if near else ""))


def _refuse_options_given_twice(block: dict, file: dict) -> None:
    for name in block.keys() & file.keys():
        raise StructLoRAError(
            f"`{name}` under `structlora:` and beside it", "each option once", "keep the one under `structlora:`"
        )


def _read_file(parser: TrlParser, of_launcher: set[str], arguments: list[str]) -> dict:
    """The keys and values of the YAML file, every key known; empty where none is named."""
    if "--config" not in arguments:
        return {}
    path = "".join(arguments[arguments.index("--config") + 1 :][:1])
    if not Path(path).is_file():
        parser.error("--config needs a file") if not path else None
        raise StructLoRAError(f"no file {path}", "a YAML file of arguments", "correct the path after `--config`")
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StructLoRAError(
            f"{path} unreadable ({' '.join(str(error).split())})", "YAML", "fix the file where the message points"
        ) from error
    if not isinstance(options, dict):
        raise StructLoRAError(f"{path} without keys", "lines of `key: value`", "write one argument a line")
    known = {action.dest for action in parser._actions if action.dest != "help"} | {"env"} | of_launcher
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), sorted(known), 1)
            hint = f" (did you mean `{near[0]}`?)" if near else ""
            raise StructLoRAError(
                f"an unknown key `{name}` in {path}{hint}",
                "arguments that `--help` lists",
                "correct or remove it",
            )
    return options
