"""Arguments of the commands; for training they are TRL's own, from a YAML file and the command line."""

from __future__ import annotations

import argparse
import difflib
import os
from dataclasses import fields
from types import ModuleType
from typing import Any, NamedTuple

from ..config import StructLoRAConfig
from ..errors import StructLoRAError, refusing
from ..yaml_block import PREFIX
from .early import add_own_arguments, read_own, read_yaml

_DESCRIPTION = """Run TRL's script `{name}` with StructLoRA on its LoRA adapter.

Takes the arguments of `trl {name}`, in a YAML file (--config), on the command line, or both; the command line wins.
StructLoRA's options stand under the key `structlora:` of the file, and are --structlora.NAME on the command line: the last
group below. `structlora: false` is plain LoRA. LoRA is always on (lora_r, lora_alpha, lora_target_modules, ...).
dataset_name may be a .json, .jsonl, .csv or .parquet file, a folder of them, or a data set of the hub; test_split_size sets
rows of it apart for evaluation. Pictures: a folder with a metadata.jsonl, whose `file_names` become the column `images`.

Arguments of `accelerate launch` (--num_processes, ...) start processes, and so does --accelerate_config with a file that
`accelerate config` writes or a name that TRL has (multi_gpu, zero1, zero2, zero3, fsdp2). Each may be a key of the file.
"""
_EXAMPLES = """examples:
  structlora init {name} > run.yaml     # a file to start from
  structlora {name} --config run.yaml
  structlora {name} --config run.yaml --structlora.beta 0.5 --learning_rate 1e-4
  structlora {name} --config run.yaml --structlora false --output_dir lora     # plain LoRA, all else equal
  structlora {name} --config run.yaml --resume_from_checkpoint true
  structlora {name} --config run.yaml --accelerate_config zero2 --num_processes 4
  torchrun --nproc_per_node 8 -m structlora_trl.cli {name} --config run.yaml
"""


class Arguments(NamedTuple):
    """What a training command was given."""

    structlora: StructLoRAConfig | None  # None: plain LoRA
    overwrite: bool
    script: Any  # trl.ScriptArguments
    training: Any  # SFTConfig, DPOConfig, ...
    model: Any  # trl.ModelConfig
    mixture: Any  # trl.DatasetMixtureConfig
    launcher: list[str]  # what is for `accelerate launch`


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def parser_of(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose help shows description and examples line by line."""
    return argparse.ArgumentParser(
        f"structlora {command}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse(name: str, script: ModuleType, arguments: list[str]) -> Arguments:
    """Read a training command's arguments: what stands after it on the command line.

    Raises:
        StructLoRAError: a YAML file that is missing, broken or has an unknown key; or a value that is
            refused.
        SystemExit: `--help`, or an unknown argument on the command line.
    """
    from .launch import launch_parser, words_of

    parser, launcher = _training_parser(name, script), launch_parser()
    launchers = _names(launcher) - _names(parser)
    file_parser = argparse.ArgumentParser(parser.prog, parser.usage, add_help=False, allow_abbrev=False)
    file_parser.add_argument("--config")
    given, words = file_parser.parse_known_args(arguments)
    # `--learning-rate` and `--no_packing` are words of a command line alone: TRL reads them in no file.
    keys = {action.dest for action in parser._actions} | launchers | {"env"}
    file = {} if given.config is None else read_yaml(given.config)
    for key in file.keys() - keys:
        raise StructLoRAError(
            f"an unknown key `{key}` in {given.config}{_hint(str(key), keys)}",
            "arguments that `--help` lists",
            "correct or remove it",
        )
    known = _names(parser) | launchers
    for word in words:
        flag = word.split("=")[0]
        if flag.startswith("--") and flag[2:] not in known:
            parser.error(f"unknown argument {flag}{_hint(flag[2:], known)}")
    os.environ.update({variable: str(value) for variable, value in (file.pop("env", None) or {}).items()})
    parser.set_defaults_with_config(**file)
    remedy = "correct the argument it names; without a GPU, `use_cpu: true` trains tiny models on the CPU"
    with refusing("reading the arguments", f"values that `trl {name}` accepts", remedy):
        *theirs, ours, rest = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    for_launcher = [*words_of({key: file[key] for key in launchers & file.keys()}, launcher), *rest]
    if for_launcher:
        stray = launcher.parse_args([*for_launcher, "."]).training_script
        if stray != ".":
            parser.error(f"unexpected {stray!r}; each value follows the --name of its argument")
    return Arguments(read_own(vars(ours)), ours.overwrite, *theirs, for_launcher)


def _training_parser(name: str, script: ModuleType):
    """TRL's parser, with our arguments, and LoRA on."""
    parser = script.make_parser()
    parser.prog = f"structlora {name}"
    parser.usage = f"structlora {name} --config run.yaml [--any_argument value]"
    parser.description, parser.epilog = _DESCRIPTION.format(name=name), _EXAMPLES.format(name=name)
    parser.formatter_class, parser.allow_abbrev = _HelpFormatter, False
    parser.set_defaults(use_peft=True)
    if name == "reward":
        parser.set_defaults(lora_task_type="SEQ_CLS")  # TRL leaves it to the user
    add_own_arguments(parser)
    return parser


def _names(parser: argparse.ArgumentParser) -> set[str]:
    """What may stand after `--`."""
    return {flag[2:] for action in parser._actions for flag in action.option_strings if flag.startswith("--")}


def _hint(name: str, known: set[str]) -> str:
    """The nearest of the known names, in words. Options of ours without their prefix count as misspelt."""
    meant = {name: name for name in known}
    meant |= {option.name: PREFIX + option.name for option in fields(StructLoRAConfig)}
    meant |= {"lora_rank": "lora_r"}  # as other trainers call it; nearer to `local_rank`
    near = difflib.get_close_matches(name.replace("-", "_").removeprefix("no_"), meant, 1)
    return f" (did you mean `{meant[near[0]]}`?)" if near else ""
