"""Errors that a user can act on, and the exit code that each gives the command line.

Every message is one line: what is wrong, where, and what to do about it. `crosscoder` prints it without a
traceback (`--debug` shows it) and exits with the class's `exit_code`.
"""

from __future__ import annotations


class CrosscoderError(Exception):
    """Base of all errors raised on purpose by this package."""

    exit_code = 1


class ConfigError(CrosscoderError, ValueError):
    """An option or a combination of options that cannot work."""

    exit_code = 2


class DataError(CrosscoderError, ValueError):
    """An input (text, snapshot, activation store, weights file) is missing, damaged or of another shape."""

    exit_code = 3


class NonFiniteError(CrosscoderError, ArithmeticError):
    """A NaN or an infinity where a finite number must be."""

    exit_code = 4


class StorageError(CrosscoderError, OSError):
    """Writing failed: disk full, read-only folder, missing permission."""

    exit_code = 5


class MissingDependencyError(CrosscoderError, RuntimeError):
    """Something that must be installed or present on this machine is not."""

    exit_code = 6


class BusyError(CrosscoderError, RuntimeError):
    """Another command works on the same run."""

    exit_code = 7


def printable(text: str) -> str:
    """`text` with control characters escaped: names, files and servers must not reach a terminal's controls."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
