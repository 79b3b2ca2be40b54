"""The one exception users see: it says what was found, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
        ...     StructLoRAConfig(filter="ibb")
        ... except StructLoRAError as error:
        ...     print(error.remedy)
        correct `filter`
    """

    def __init__(self, found: str, expected: str, remedy: str):
        self.found, self.expected, self.remedy = found, expected, remedy
        super().__init__(f"StructLoRA found {found}. Expected {expected}. Fix: {remedy}.")

    def __reduce__(self):
        return type(self), (self.found, self.expected, self.remedy)


@contextmanager
def refusing(what: str, expected: str, remedy: str, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn another library's error about the user's input into a `StructLoRAError`. Never wrapped around
    training itself.

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
        raise StructLoRAError(
            f"that {what} failed ({type(cause).__name__}: {message})", expected, remedy
        ) from error
