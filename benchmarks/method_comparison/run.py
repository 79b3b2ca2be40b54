"""Run an experiment of PEFT's `method_comparison` as StructLoRA, so that its row stands beside LoRA, DoRA and AdaLoRA.

    git clone https://github.com/huggingface/peft && git -C peft checkout 5d602fdbff04c33c1c4de55cda9d4ae1d7cb7e40
    pip install -r peft/method_comparison/MetaMathQA/requirements.txt
    python -m benchmarks.method_comparison.run peft/method_comparison/MetaMathQA lora/llama-3.2-3B-rank32 beta=0.5
    python -m benchmarks.method_comparison.run peft/method_comparison/image-gen lora/flux2-klein-default

The suite's own script does everything: data, model, training loop, evaluation, timing and the result file. This one copies the
LoRA experiment to `experiments/structlora/<name>`, with the options in `structlora.json` beside its configuration, and
attaches StructLoRA to the optimizer that the suite builds. The suites need a GPU. A test runs MetaMathQA's script on a tiny model;
image-gen's was not run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import yaml

from structlora_trl import StructLoRAConfig, attach

PINNED = "5d602fdbff04c33c1c4de55cda9d4ae1d7cb7e40"  # the commit of PEFT that the test runs
OPTIONS = "structlora.json"


def copy_experiment(suite: Path, name: str, config: StructLoRAConfig) -> str:
    """Make the StructLoRA experiment of a LoRA experiment; its path within the suite.

    Args:
        suite (`Path`): a folder of `method_comparison`.
        name (`str`): an experiment of it, as in `lora/llama-3.2-3B-rank32`.
        config (`StructLoRAConfig`): the options.

    Raises:
        SystemExit: there is no such experiment.
    """
    source = suite / "experiments" / name
    if not (source / "adapter_config.json").is_file():
        known = sorted(
            path.parent.name for path in (suite / "experiments" / "lora").glob("*/adapter_config.json")
        )
        raise SystemExit(f"No experiment {source}. LoRA experiments of this suite: {', '.join(known)}.")
    target = Path("experiments") / "structlora" / Path(name).name
    shutil.copytree(source, suite / target, dirs_exist_ok=True)
    (suite / target / OPTIONS).write_text(json.dumps(config.options(), indent=2) + "\n")
    return str(target)


def attach_to(run: ModuleType, config: StructLoRAConfig, labels: float) -> None:
    """Let the suite's script train StructLoRA: what it calls for an optimizer attaches it as well.

    Args:
        run (`ModuleType`): the suite's script.
        config (`StructLoRAConfig`): the options.
        labels (`float`): of a row, since the loss is a mean over them.
    """
    build, train, batch = run.get_optimizer_and_scheduler, run.train, []

    def train_in_batches(**given):
        batch.append(given["batch_size"] * labels)
        return train(**given)

    def get_optimizer_and_scheduler(model, *, max_steps, **options):
        optimizer, scheduler = build(model, max_steps=max_steps, **options)
        # A run sees less than its data once, so that N is what it sees.
        runtime = attach(model, optimizer, config, examples=max_steps * batch[-1], batch_size=batch[-1])
        print(runtime, file=sys.stderr)
        return optimizer, scheduler

    run.train, run.get_optimizer_and_scheduler = train_in_batches, get_optimizer_and_scheduler


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", type=Path, help="folder of the suite, in a checkout of PEFT")
    parser.add_argument("experiment", help="a LoRA experiment of the suite")
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="options of StructLoRA")
    parser.add_argument(
        "--labels",
        type=float,
        default=200,
        help="tokens of a row, which the loss is a mean of (default: 200)",
    )
    parser.add_argument(
        "--clean", action="store_true", help="delete the trained adapter, as the suite's flag does"
    )
    given = parser.parse_args(arguments)
    config = StructLoRAConfig.build(
        {k: yaml.safe_load(v) for k, _, v in (o.partition("=") for o in given.options)}
    )

    experiment = copy_experiment(given.suite, given.experiment, config)
    os.chdir(given.suite)  # where the suite looks for `experiments/`, and Python for its modules
    sys.path.insert(0, os.getcwd())
    run = importlib.import_module("run")
    # Its script sets it under __main__.
    run.print_verbose = lambda *text, **how: print(*text, **{**how, "file": sys.stderr})
    attach_to(run, config, given.labels)
    name = run.validate_experiment_path(experiment)
    run.main(path_experiment=experiment, experiment_name=name, clean=given.clean, bucket_name=None)


if __name__ == "__main__":
    main()
