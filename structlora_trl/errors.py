"""The one exception users see: it says what was found, what was expected and what to do."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path

# What other libraries raise about files, values, columns and packages.
_ABOUT_INPUT = (OSError, ValueError, TypeError, LookupError, ArithmeticError, ImportError)


class StructLoRAError(RuntimeError):
    """Raised wherever StructLoRA cannot act as asked.

    Args:
        found (`str`): what the code met.
        expected (`str`): what it needs instead.
        remedy (`str`): what the user can do about it.

    Example:
        >>> try:
        ...     StructLoRAConfig(edges="all")
        ... except StructLoRAError as error:
        ...     print(error.remedy)
        correct `edges`
    """

    def __init__(self, found: str, expected: str, remedy: str):
        self.found, self.expected, self.remedy = found, expected, remedy
        super().__init__(f"StructLoRA found {found}. Expected {expected}. Fix: {remedy}.")

    def __reduce__(self):
        return type(self), (self.found, self.expected, self.remedy)


@contextmanager
def refusing(what: str, expected: str, remedy: str, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn another library's error about the user's input into a `StructLoRAError`. Not around training.

    Args:
        what (`str`): what was tried.
        expected (`str`): what it needs.
        remedy (`str`): what the user can do.
        also (`tuple`, *optional*): further errors that are about the input here.

    Raises:
        StructLoRAError: with the other library's message in it.
    """
    try:
        yield
    except StructLoRAError:
        raise
    except (*_ABOUT_INPUT, *also) as error:
        cause = error
        while cause.__cause__ is not None:  # the outermost often says only that something failed
            cause = cause.__cause__
        raise StructLoRAError(
            f"that {what} failed ({type(cause).__name__}: {_brief(str(cause))})", expected, remedy
        ) from error


def _brief(message: str) -> str:
    """A message on one line; of lines that begin alike, as torch lists tensors of other shapes, the first and their number."""
    lines = [line.split() for line in message.splitlines() if line.strip()]
    alike = [[*lines_alike] for _, lines_alike in groupby(lines, key=lambda words: words[:3])]
    told = (" ".join(first) + (f" (and {len(more):,} more)" if more else "") for first, *more in alike)
    return " ".join(told).rstrip(".")


def refuse_used(folder: Path) -> None:
    """Stop where something lies in a folder that is to be written, or where it cannot be made.

    Raises:
        StructLoRAError: the message names the folder.
    """
    refuse_unwritable(folder)
    with _looking_at(folder):
        is_used = folder.exists() and any(folder.iterdir())
    if is_used:
        raise StructLoRAError(
            f"{folder}, which is not empty", "a new or empty folder", "name another, or empty it"
        )


def refuse_unwritable(folder: Path) -> None:
    """Stop where a folder cannot be made or written to: a file is in its place or above, or no permission.

    Args:
        folder (`Path`): it may exist already.

    Raises:
        StructLoRAError: the message names the file or the folder that is in the way.
    """
    with _looking_at(folder), suppress(FileNotFoundError, NotADirectoryError):
        folder.lstat()
    path = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    where = "" if path == folder else f", above {folder}"
    if not path.is_dir():
        raise StructLoRAError(
            f"a file {path}{where}, where a folder is to be written",
            "a folder, or a path at which one can be made",
            "name another path, or move the file",
        )
    if not os.access(path, os.W_OK | os.X_OK):
        raise StructLoRAError(
            f"no permission to write in {path}{where}",
            "a folder that can be written to",
            "name another path, or change its permissions",
        )


def refuse_unwritable_file(path: Path) -> None:
    """Stop where a file cannot be made or written over.

    Raises:
        StructLoRAError: the message names what is in the way.
    """
    refuse_unwritable(path.parent)
    with _looking_at(path), suppress(FileNotFoundError):
        path.lstat()
    if path.exists() and not path.is_file():
        raise StructLoRAError(
            f"{'a folder' if path.is_dir() else 'no regular file'} {path}, where a file is to be written",
            "the name of a file",
            f"name a file, such as {path.parent / 'report.html'}",
        )


@contextmanager
def _looking_at(path: Path) -> Iterator[None]:
    """Turn an error about a path that the file system does not take into ours."""
    try:
        yield
    except OSError as error:
        raise StructLoRAError(
            f"that looking at {path} failed ({error.strerror})",
            "a path that the file system takes",
            "name another path",
        ) from error


@contextmanager
def writing(out: Path, also: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """A folder to write to, whose files are moved to `out` at the end: an error leaves nothing of them.

    Args:
        out (`Path`): a folder, made where missing; the other one is beside it, on the same disk.
        also (`tuple`, *optional*): errors of other libraries that are about the disk here.

    Raises:
        StructLoRAError: the disk is full, or it may not be written to. Errors about models and data should be ours by then.
    """
    try:
        near = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=near) as unfinished:
            yield Path(unfinished)
            out.mkdir(parents=True, exist_ok=True)
            for path in Path(unfinished).iterdir():
                path.replace(out / path.name)
    except (OSError, *also) as error:
        message = " ".join(str(error).split()).rstrip(".")
        raise StructLoRAError(
            f"that writing {out} failed ({message})",
            "room on the disk and permission to write, there and in the folder for temporary files "
            f"({tempfile.gettempdir()}, which TMPDIR names)",
            "free some space, or name another folder",
        ) from error


def nearest(name: str) -> str:
    """The nearest name beside a path that is not there, in words."""
    path = Path(name).expanduser()
    if path.exists() or not path.parent.is_dir():
        return ""
    beside = [other.name for other in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, beside, 1)
    return f" (did you mean {'' if path.is_absolute() else './'}{path.parent / near[0]}?)" if near else ""
