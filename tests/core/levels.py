"""Python in a process of its own, at one of the instruction-set levels: the level is chosen once a process."""

from __future__ import annotations

import os
import subprocess
import sys


def python_at(isa: str, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """`python arguments...` with CROSSCODER_ISA=`isa`."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "CROSSCODER_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
