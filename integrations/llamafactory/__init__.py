"""LLaMA-Factory: `structlora-llamafactory train run.yaml [key=value ...]` is `llamafactory-cli train` with
StructLoRA.

LLaMA-Factory takes callbacks from Python alone (`run_exp(args, callbacks=[...])`) and refuses keys it does
not know, so the `structlora:` key is read and taken out here. Where it is absent, StructLoRA trains with its
defaults. On several devices, or with FORCE_TORCHRUN=1, the command starts itself under torchrun with the
variables that `llamafactory-cli` reads.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from structlora_trl.errors import StructLoRAError
from structlora_trl.yaml_block import PREFIX, read_over, read_switch

USAGE = """\
usage: structlora-llamafactory train CONFIG.yaml [KEY=VALUE ...]

Trains what `llamafactory-cli train` would, as StructLoRA. Options go under the key `structlora:`, or after the
configuration as structlora.beta=0.5; `structlora: false` trains plain LoRA. Every other key is LLaMA-Factory's.
Several processes: FORCE_TORCHRUN=1 NPROC_PER_NODE=2 before the command (also NNODES, NODE_RANK, MASTER_ADDR,
MASTER_PORT), as for llamafactory-cli.
Chat with, evaluate or export the adapter with llamafactory-cli: it is a plain LoRA adapter."""


def main() -> int:
    """The command. Exit code 2 where the command line or the configuration is at fault."""
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else "help"), sys.argv[2:]
    if command in ("help", "-h", "--help"):
        print(USAGE)
        return 0
    try:
        if command != "train":
            raise StructLoRAError(
                f"the command `{command}`",
                "`train`",
                f"run `llamafactory-cli {command}`: the adapter is plain LoRA",
            )
        args = read_arguments(arguments)
        if _wants_torchrun():
            _torchrun(arguments)
        else:
            train(args)
    except StructLoRAError as error:
        print(f"structlora-llamafactory: {error}", file=sys.stderr)
        return 2
    return 0


def read_arguments(arguments: list[str]) -> dict:
    """LLaMA-Factory's arguments from a file and `key=value` overrides; `structlora` holds a
    `StructLoRAConfig` or False.

    Raises:
        StructLoRAError: no such file; an option of StructLoRA that is misspelt or out of range; no LoRA.
    """
    import yaml
    from omegaconf import OmegaConf

    if (
        not arguments
        or not arguments[0].endswith((".yaml", ".yml", ".json"))
        or not Path(arguments[0]).is_file()
    ):
        raise StructLoRAError(
            f"{arguments[0] if arguments else 'nothing'} after `train`",
            "a YAML or JSON file that exists",
            "name the configuration first, then overrides as key=value",
        )
    options = dict(word.split("=", 1) for word in arguments[1:] if word.startswith(PREFIX) and "=" in word)
    others = [word for word in arguments[1:] if word.partition("=")[0] not in options]
    args = OmegaConf.merge(OmegaConf.load(arguments[0]), OmegaConf.from_cli(others))
    args = OmegaConf.to_container(args)
    options = {name: yaml.safe_load(value) for name, value in options.items()}
    args["structlora"] = read_over(args.get("structlora", True), options) or False
    kind = args.get("finetuning_type", "lora")
    if args["structlora"] and kind != "lora":
        raise StructLoRAError(
            f"`finetuning_type: {kind}`",
            "lora",
            "write `finetuning_type: lora`, or train this one with `llamafactory-cli train`",
        )
    return args


def train(args: dict) -> None:
    """Run LLaMA-Factory's training with the callback.

    Args:
        args (`dict`): what `read_arguments` returns, or LLaMA-Factory's own arguments with `structlora`
            beside them.

    Raises:
        StructLoRAError: whatever keeps StructLoRA from acting, a trainer that runs no callbacks included.
    """
    from llamafactory.train.tuner import run_exp

    from structlora_trl.trainers.callback import StructLoRACallback

    args = dict(args)
    config = read_switch(args.pop("structlora", True))
    if config is None:
        run_exp(args)
        return
    callback = StructLoRACallback(config)
    run_exp(args, callbacks=[callback])
    # Ray trains in other processes, on copies of the callback.
    if args.get("do_train") and not _ray() and callback.runtime is None:
        raise StructLoRAError(
            "a training run that never reached the StructLoRA callback",
            "a trainer that runs its callbacks",
            "choose a `stage` and a backend that train with a `transformers.Trainer`",
        )


def _ray() -> bool:
    from llamafactory.extras.misc import use_ray

    return use_ray()


def _wants_torchrun() -> bool:
    """Whether to start processes with torchrun, as llamafactory-cli decides; not within one that torchrun
    started.
    """
    from llamafactory.extras.misc import get_device_count, is_env_enabled, use_kt

    if "LOCAL_RANK" in os.environ:
        return False
    return is_env_enabled("FORCE_TORCHRUN") or (get_device_count() > 1 and not _ray() and not use_kt())


def _torchrun(arguments: list[str]) -> None:
    from llamafactory.extras.misc import find_available_port, get_device_count
    from torch.distributed.run import main as torchrun

    settings = {
        "--nnodes": os.getenv("NNODES", "1"),
        "--node_rank": os.getenv("NODE_RANK", "0"),
        "--nproc_per_node": os.getenv("NPROC_PER_NODE", str(get_device_count())),
        "--master_addr": os.getenv("MASTER_ADDR", "127.0.0.1"),
        "--master_port": os.getenv("MASTER_PORT", str(find_available_port())),
    }
    torchrun(
        [word for pair in settings.items() for word in pair] + ["--module", __name__, "train", *arguments]
    )
