"""A test that never ends fails, with the line at which it hangs, under the timeouts of pyproject.toml."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HANGING = """
import itertools

def test_python():
    while True:
        pass

def test_the_next_one():
    pass
"""
UNINTERRUPTIBLE = """
import itertools

def test_c():
    max(itertools.repeat(1))  # one call into C that never looks for signals
"""


def session(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A session with the project's own settings but for `options`, in a process of its own."""
    file = folder / "test_hanging.py"
    file.write_text(text)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder), *options]
    return subprocess.run([*command, str(file)], capture_output=True, text=True, timeout=120, check=False)


def test_a_hung_loop_fails_and_the_others_go_on(tmp_path: Path) -> None:
    done = session(tmp_path, HANGING, "-o", "timeout=1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Timeout (>1.0s) from pytest-timeout" in done.stdout
    assert re.search(r"test_hanging\.py:[56]: Failed", done.stdout), done.stdout
    assert "1 failed, 1 passed" in done.stdout


def test_a_loop_that_no_signal_reaches_ends_the_session(tmp_path: Path) -> None:
    done = session(tmp_path, UNINTERRUPTIBLE, "-o", "timeout=1", "-o", "faulthandler_timeout=3")
    assert done.returncode not in (0, 124), done.stdout
    assert "Timeout" in done.stderr and "in test_c" in done.stderr


def test_every_test_has_a_timeout(pytestconfig: pytest.Config) -> None:
    assert float(pytestconfig.getini("timeout")) == 300
    assert pytestconfig.getini("faulthandler_timeout") == "1500" or pytestconfig.getini("faulthandler_timeout") == 1500
    assert pytestconfig.getini("faulthandler_exit_on_timeout") is True
