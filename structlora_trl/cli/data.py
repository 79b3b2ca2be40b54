"""Data in the form that TRL's scripts load, and a look at it before the model is loaded."""

from __future__ import annotations

import dataclasses

from datasets import load_dataset
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset
from trl.scripts.utils import DatasetConfig

from ..errors import StructLoRAError
from ..local_data import check_rows, load_arguments, local_path, reading


def sources(script: ScriptArguments, mixture: DatasetMixtureConfig) -> list[str]:
    """Return the names of files, folders and data sets as they were given, before `as_mixture`."""
    found = []
    for part in mixture.datasets:
        names = part if isinstance(part, str) else part.data_files or part.path
        found += names if isinstance(names, list) else [str(names)]
    return found or [script.dataset_name]


def as_mixture(script: ScriptArguments, mixture: DatasetMixtureConfig) -> None:
    """Write local files, and data that `test_split_size` splits, as the mixtures that TRL's scripts load.

    Raises:
        StructLoRAError: no data, a path that does not exist, or an empty file.
    """
    if mixture.datasets:
        # TRL takes entries with a path; a name or a path alone is one, too.
        parts = [DatasetConfig(part) if isinstance(part, str) else part for part in mixture.datasets]
        mixture.datasets = [dataclasses.replace(part, **load_arguments(part.path)) for part in parts]
        return
    if not isinstance(script.dataset_name, str) or not script.dataset_name:
        raise StructLoRAError(
            f"dataset_name={script.dataset_name!r}, and no `datasets`",
            "one name or path, or a list of them under `datasets`",
            "set `dataset_name` to a file, a folder or a data set of the hub, or list several under `datasets` "
            "(`- path: rows.jsonl`)",
        )
    found = load_arguments(script.dataset_name)
    if "data_files" not in found and mixture.test_split_size is None:
        script.dataset_name = found["path"]
        return
    part = DatasetConfig(name=script.dataset_config, split=script.dataset_train_split, **found)
    mixture.datasets, mixture.streaming = [part], script.dataset_streaming
    script.dataset_name, script.dataset_train_split = None, "train"  # as a mixture names its rows
    if mixture.test_split_size is not None:
        script.dataset_test_split = "test"


def check(
    command: str, source: str, script: ScriptArguments, mixture: DatasetMixtureConfig, training
) -> None:
    """Load what `as_mixture` wrote, as the script will (then from the cache), and look at splits, columns and cells.

    Args:
        source (`str`): what the rows are called.

    Raises:
        StructLoRAError: files that cannot be read, a missing split, or rows that the command cannot train on.
    """
    with reading(source):
        if mixture.datasets:  # in the order of the files: `test_split_size` draws rows anew
            splits = get_dataset(dataclasses.replace(mixture, test_split_size=None))
        else:
            splits = load_dataset(
                script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming
            )
    names = {"dataset_train_split": script.dataset_train_split}
    if training.eval_strategy != "no" and mixture.test_split_size is None:
        names["dataset_test_split"] = script.dataset_test_split
    for argument, name in names.items():
        if name not in splits:
            raise StructLoRAError(
                f"no split '{name}' in {source} (it has {', '.join(map(repr, splits))})",
                f"the split that `{argument}` names",
                f"set `{argument}`; for evaluation, `test_split_size: 0.1` sets rows apart, and `eval_strategy: 'no'` "
                "needs none",
            )
        where = source if len(splits) == 1 else f"split '{name}' of {source}"
        check_rows(command, splits[name], where, getattr(training, "dataset_text_field", "text"))


def held_out(script: ScriptArguments, mixture: DatasetMixtureConfig, training) -> dict | None:
    """Return where the rows are that a run evaluates on, for `shrink.rows`, after `as_mixture`; None where it does not."""
    if training.eval_strategy == "no":
        return None
    if mixture.datasets:
        return {**dataclasses.asdict(mixture), "split": script.dataset_test_split, "seed": training.seed}
    path = local_path(script.dataset_name)
    name = str(path.absolute()) if path else script.dataset_name
    return {"path": name, "name": script.dataset_config, "split": script.dataset_test_split}
