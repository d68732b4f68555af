"""The error that a user can fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError


class UsageError(ValueError):
    """Something the user can fix: an option, a file, a combination that does not work.

    The message is one line that names the option, its value and what to use instead. The command line shows that line
    and no traceback; every other exception is a bug, here or in a library, and keeps its traceback.
    """


@contextmanager
def within(context: str) -> Iterator[None]:
    """Put `context`, such as "method_options of kara", in front of the message of a UsageError raised in the block."""
    try:
        yield
    except UsageError as e:
        raise UsageError(f"{context}: {e}") from None


def message_of(error: Exception) -> str:
    """The error's message, without pydantic's additions if the validation of vLLM's config raised it."""
    if isinstance(error, ValidationError):
        return "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
    return str(error)
