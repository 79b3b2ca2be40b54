"""Other libraries' errors about what a user gave them, in our form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from datasets.exceptions import DatasetsError

from .errors import StructLoRAError

# What libraries raise about files, values, columns and packages. Never wrapped around training itself.
_ABOUT_INPUT = (OSError, ValueError, TypeError, KeyError, ImportError, DatasetsError)


@contextmanager
def refusing(what: str, expected: str, remedy: str, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn an error about the user's input into a `StructLoRAError`.

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
        message = " ".join(str(cause).split()).rstrip(".")
        raise StructLoRAError(f"that {what} failed ({type(cause).__name__}: {message})", expected, remedy) from error
