"""The command line as tests call it."""

from __future__ import annotations

import pytest

from crosscoder import cli


def run(*arguments: object) -> int:
    """`crosscoder ARGUMENTS` in this process: its exit code."""
    return cli.main([str(argument) for argument in arguments])


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error that was printed, without a traceback."""
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, printed
    return lines[0]
