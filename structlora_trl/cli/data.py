"""Local data in the form that TRL's scripts load, and checks of it before the model is loaded."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from itertools import islice

import datasets
from datasets.arrow_writer import SchemaInferenceError
from datasets.exceptions import DatasetGenerationError, DatasetsError
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset
from trl.scripts.utils import DatasetConfig

from ..errors import StructLoRAError, refusing
from .early import if_offline
from .local_rows import BUILDERS, LOOKED_AT, form_of, local_data, refuse_cells


def as_mixture(script: ScriptArguments, mixture: DatasetMixtureConfig) -> None:
    """Write local files, and data that `test_split_size` splits, as the mixtures that TRL's scripts load.

    Raises:
        StructLoRAError: no data, a path that does not exist, or an empty file.
    """
    is_streamed = mixture.streaming if mixture.datasets else script.dataset_streaming
    if mixture.test_split_size is not None and is_streamed:
        raise StructLoRAError(
            "`test_split_size` and streamed rows, whose number is not known",
            "one of them",
            "give the rows for evaluation a split or a file of their own, or remove `dataset_streaming`",
        )
    if mixture.datasets:
        entries = mixture.datasets if isinstance(mixture.datasets, list) else [mixture.datasets]
        # TRL takes entries with a path; a name or a path alone is one, too.
        mixture.datasets = [DatasetConfig(entry) if isinstance(entry, str) else entry for entry in entries]
        for part in mixture.datasets:
            part.path, part.data_files = local_data(part.path, part.data_files)
        return
    if not isinstance(script.dataset_name, str) or not script.dataset_name:
        raise StructLoRAError(
            f"dataset_name={script.dataset_name!r}, and no `datasets`",
            "one name or path, or a list of them under `datasets`",
            "set `dataset_name` to a file, a folder or a data set of the hub, or list several under `datasets` "
            "(`- path: rows.jsonl`)",
        )
    path, files = local_data(script.dataset_name, None)
    if files is None and mixture.test_split_size is None:
        script.dataset_name = path
        return
    part = DatasetConfig(path, script.dataset_config, data_files=files, split=script.dataset_train_split)
    mixture.datasets, mixture.streaming = [part], script.dataset_streaming
    script.dataset_name, script.dataset_train_split = None, "train"  # as a mixture names its rows
    if mixture.test_split_size is not None:
        script.dataset_test_split = "test"


def check(name: str, script: ScriptArguments, mixture: DatasetMixtureConfig, training) -> None:
    """Load what `as_mixture` wrote, as the script will (then from the cache), and look at splits and columns.

    Raises:
        StructLoRAError: files that cannot be read, a missing split, or columns that the script does not take.
    """
    with refusing(
        "loading the data",
        "files or a data set that `datasets` reads",
        "correct `dataset_name` or `datasets`: files or a folder, or a data set of the hub that can be reached"
        f"{if_offline(*sources(script, mixture))}",
        also=(AttributeError, DatasetsError),  # AttributeError: streamed rows have no split
    ):
        try:
            if mixture.datasets:  # as the files have them: `test_split_size` draws rows anew
                splits = get_dataset(dataclasses.replace(mixture, test_split_size=None))
            else:
                splits = datasets.load_dataset(
                    script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming
                )
        # A JSON file without a row: the first from datasets 5, the second before.
        except (StopIteration, DatasetGenerationError) as error:
            if not isinstance(error, StopIteration) and not isinstance(error.__cause__, SchemaInferenceError):
                raise
            raise StructLoRAError(
                f"a file without rows in {', '.join(sources(script, mixture))}",
                "rows in each file",
                "remove the empty file, or write its rows",
            ) from error
    rows = _split(splits, script.dataset_train_split, "dataset_train_split")
    if training.eval_strategy != "no" and mixture.test_split_size is None:
        _split(splits, script.dataset_test_split, "dataset_test_split")
    size, found = mixture.test_split_size, rows.column_names
    if size is not None and math.ceil(size * len(rows)) >= len(rows):
        raise StructLoRAError(
            f"test_split_size={size} of {len(rows)} rows, which leaves none to train on",
            "rows for both",
            "lower `test_split_size`, or give more rows",
        )
    form = form_of(name, found, getattr(training, "dataset_text_field", "text"))
    if form is None:
        return
    for name, part in splits.items():
        if isinstance(part, datasets.Dataset) and part.column_names == found:
            where = f"split '{name}' of " if len(splits) > 1 else ""
            where += ", ".join(sources(script, mixture))
            refuse_cells(form, islice(part.select_columns([*form]), LOOKED_AT), where)


def sources(script: ScriptArguments, mixture: DatasetMixtureConfig) -> list[str]:
    """Where the rows are read from: the files that are named, else the folders and data sets."""
    found = []
    for part in mixture.datasets:
        files = part.data_files or part.path
        files = files if isinstance(files, list) else [str(files)]
        found += [re.sub(r"\[([*?\[])\]", r"\1", file) for file in files]  # what `glob.escape` did
    return found or [script.dataset_name]


def held_out(script: ScriptArguments, mixture: DatasetMixtureConfig, training) -> dict | None:
    """Where the rows are that a run evaluates on, for `adapters.rows`, after `as_mixture`; None where it does not."""
    if training.eval_strategy == "no":
        return None
    if not mixture.datasets:
        path = (
            os.path.abspath(script.dataset_name)
            if os.path.exists(script.dataset_name)
            else script.dataset_name
        )
        return {"path": path, "name": script.dataset_config, "split": script.dataset_test_split}
    parts = [dataclasses.asdict(part) for part in mixture.datasets]
    for part in parts:
        if isinstance(part["data_files"], str) and part["path"] in BUILDERS.values():
            part["data_files"] = os.path.abspath(part["data_files"])
    return {
        "datasets": parts,
        "test_split_size": mixture.test_split_size,
        "split": script.dataset_test_split,
        "seed": training.seed,
    }


def _split(splits, name: str, argument: str):
    if name not in splits:
        raise StructLoRAError(
            f"no split '{name}' in the data (it has {', '.join(map(repr, splits))})",
            f"the split that `{argument}` names",
            f"set `{argument}`; for evaluation, `test_split_size: 0.1` sets rows apart, and `eval_strategy: 'no'` "
            "needs none",
        )
    return splits[name]
