"""Run a command, kill it with SIGKILL at random moments, and run it again until it ends."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

from faults.forking import Forks

LIMIT_SECONDS = 600


def crosscoder(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "crosscoder", *map(str, arguments)]


def run(command: list[str], folder: Path) -> None:
    """Run to the end in `folder`; fail with what it printed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def run_with_kills(forks: Forks, folder: Path, kills: int, longest: float, seed: int, *arguments: object) -> int:
    """Kill `crosscoder ARGUMENTS`, run in `folder`, `kills` times, each after at most `longest` seconds.

    Then let it end. Returns how often it was killed: a run that ended before its time stops the series.
    """
    moments = random.Random(seed)
    for done in range(kills):
        command = forks.start(folder, *arguments)
        if command.wait(moments.uniform(0.02, longest)) is not None:
            assert command.wait() == 0, command.printed()[-4000:]
            return done
        command.kill()
    forks.run(folder, *arguments)
    return kills


def files_of(folder: Path, *patterns: str) -> dict[str, bytes]:
    """Contents of the files that match, by relative path."""
    found = {str(path.relative_to(folder)): path for pattern in patterns for path in folder.glob(pattern)}
    return {name: path.read_bytes() for name, path in sorted(found.items()) if path.is_file()}
