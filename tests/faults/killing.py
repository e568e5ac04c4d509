"""Run a command, kill it with SIGKILL at random moments, and run it again until it ends."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

LIMIT_SECONDS = 600


def crosscoder(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "crosscoder", *map(str, arguments)]


def run(command: list[str], folder: Path) -> None:
    """Run to the end in `folder`; fail with what it printed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def run_with_kills(command: list[str], folder: Path, kills: int, longest: float, seed: int) -> int:
    """Kill `command`, run in `folder`, `kills` times, each after a random time of at most `longest` seconds.

    Then let it end. Returns how often it was killed: a run that ended before its time stops the series.
    """
    moments = random.Random(seed)
    log = folder / "log"
    with log.open("w") as output:
        for done in range(kills):
            process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
            until = time.monotonic() + moments.uniform(0.3, longest)
            while time.monotonic() < until and process.poll() is None:
                time.sleep(0.01)
            if process.poll() is not None:
                assert process.returncode == 0, log.read_text()[-4000:]
                return done
            process.kill()
            process.wait()
    run(command, folder)
    return kills


def files_of(folder: Path, *patterns: str) -> dict[str, bytes]:
    """Contents of the files that match, by relative path."""
    found = {str(path.relative_to(folder)): path for pattern in patterns for path in folder.glob(pattern)}
    return {name: path.read_bytes() for name, path in sorted(found.items()) if path.is_file()}
