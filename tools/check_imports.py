"""Check the direction of imports: the contracts in pyproject.toml, by import-linter.

    python tools/check_imports.py

The package is put together in a temporary folder first, since its kernels lie outside of python/crosscoder in the
checkout. Exit code 0: every contract holds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys
from importlinter.cli import lint_imports_command
# An editable installation finds its own tree before the folder that is checked.
sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
sys.exit(lint_imports_command())
"""


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "crosscoder"
        shutil.copytree(ROOT / "python" / "crosscoder", package)
        shutil.copytree(ROOT / "kernels", package / "kernels")
        (package / "_core.pyi").rename(package / "_core.py")  # what is written in C++ imports nothing
        command = [sys.executable, "-c", PROGRAM, str(ROOT / "pyproject.toml"), "--no-cache", *sys.argv[1:]]
        return subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": folder}, cwd=folder).returncode


if __name__ == "__main__":
    sys.exit(main())
