"""Bad input on the command line: one line that names it, and no traceback."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import click

__all__ = ["Commands", "InputError", "is_special"]

_NO_MEMORY = ("allocate memory", "Storage size calculation overflowed", "numel: integer")


class InputError(Exception):
    """A file that was given cannot be used; the message names it, the place in it, and why."""


def is_special(path: str | Path) -> bool:
    """Whether a path is a pipe or a device, which is written to and never replaced."""
    return Path(path).exists() and not Path(path).is_file()


def _is_of_memory(error: Exception) -> bool:
    """Returns whether an error says that memory is exhausted, without importing torch."""
    named = type(error).__name__ == "OutOfMemoryError"
    return named or any(words in str(error) for words in _NO_MEMORY)


class _Unusable(click.ClickException):
    exit_code = 2


def _line(message: str) -> str:
    """The message on one line, with nothing in it that a terminal would obey."""
    text = " ".join(message.splitlines())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Commands(click.Group):
    """A group whose commands end with one line where the input, the environment or the machine is
    at fault: exit code 2 where it was asked for wrongly, 1 where the machine is at its end."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            raise _Unusable(_line(str(error))) from None
        except OSError as error:
            if error.errno in (None, errno.EPIPE):  # click knows of closed pipes
                raise
            where = "" if error.filename is None else f"{error.filename}: "
            raise click.ClickException(_line(f"{where}{error.strerror}")) from None
        except (MemoryError, RuntimeError, ValueError) as error:
            if isinstance(error, MemoryError) or _is_of_memory(error):
                reason = f" ({error})" if str(error) else ""
                raise click.ClickException(_line(f"not enough memory{reason}")) from None
            if str(error).startswith("backend: "):  # SNV2_BACKEND
                raise _Unusable(_line(str(error))) from None
            raise
