"""Data for the training commands: local files and folders, the hub's data sets, and TRL's mixtures."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import datasets
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from ..errors import StructLoRAError
from ..refusing import refusing

_log = logging.getLogger(__name__)
_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_PICTURES = ("images", "image")


def load(
    script: ScriptArguments, mixture: DatasetMixtureConfig, evaluate: bool, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The training rows, and the evaluation rows where they are asked for.

    Where a `dataset_name` is local, paths of pictures (columns `images` or `image`) count from its folder.

    Args:
        script (`ScriptArguments`): a data set by name or path, and its splits.
        mixture (`DatasetMixtureConfig`): or several; `test_split_size` splits either.
        evaluate (`bool`): whether evaluation rows are needed.
        seed (`int`): of the split by `test_split_size`.

    Raises:
        StructLoRAError: no data, a path that does not exist, files that cannot be read, or a missing split.
    """
    if not script.dataset_name and not mixture.datasets:
        raise StructLoRAError(
            "neither `dataset_name` nor `datasets`",
            "one of them",
            "set `dataset_name` to a file, a folder or a data set of the hub, or list several under `datasets`",
        )
    if script.dataset_name and mixture.datasets:
        _log.warning("Both `datasets` and `dataset_name` are given; `dataset_name` is ignored, as TRL's scripts do.")
    with refusing(
        "loading the data", "files or a data set that `datasets` reads", "correct `dataset_name` or `datasets`"
    ):
        if mixture.datasets:
            for part in mixture.datasets:
                part.path, part.data_files = _builder(part.path, part.data_files)
            splits = get_dataset(mixture)
        else:
            path, files = _builder(script.dataset_name, None)
            splits = datasets.load_dataset(
                path, name=script.dataset_config, data_files=files, streaming=script.dataset_streaming
            )
            splits = {name: _with_pictures(split, script.dataset_name) for name, split in splits.items()}
            if mixture.test_split_size is not None:
                train = _split(splits, script.dataset_train_split, "dataset_train_split")
                splits = train.train_test_split(test_size=mixture.test_split_size, seed=seed)
                return splits["train"], splits["test"] if evaluate else None
    train = _split(splits, script.dataset_train_split, "dataset_train_split")
    return train, _split(splits, script.dataset_test_split, "dataset_test_split") if evaluate else None


def _builder(path: str, files):
    """What `load_dataset` calls a local file: its builder and its path."""
    builder = _BUILDERS.get(Path(path).suffix)
    if builder is None and not path.startswith((".", "/", "~")):
        return path, files
    path = os.path.expanduser(path)
    if not os.path.exists(path):
        raise StructLoRAError(f"no file or folder {path}", "data to train on", "correct the path, or make the file")
    return (builder, path) if builder and os.path.isfile(path) else (path, files)


def _split(splits, name: str, argument: str):
    if name not in splits:
        raise StructLoRAError(
            f"no split '{name}' in the data (it has {', '.join(map(repr, splits))})",
            f"the split that `{argument}` names",
            f"set `{argument}`; for evaluation, `test_split_size: 0.1` sets rows apart, and `eval_strategy: 'no'` needs none",
        )
    return splits[name]


def _with_pictures(split, source: str):
    folder = Path(os.path.expanduser(source))
    folder = folder.parent if folder.is_file() else folder
    for column in _PICTURES:
        feature = (split.features or {}).get(column)
        one = getattr(feature, "feature", feature)
        if getattr(one, "dtype", None) not in ("string", "large_string"):
            continue

        def whole(row, column=column):
            value = row[column]
            return {column: str(folder / value) if isinstance(value, str) else [str(folder / path) for path in value]}

        picture = datasets.Image()
        split = split.map(whole).cast_column(column, picture if one is feature else type(feature)(picture))
    return split
