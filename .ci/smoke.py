"""The installed wheel, used as a stranger would: the command, a tiny training, the saved crosscoder."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import crosscoder


def command(*arguments: str) -> str:
    script = Path(sys.executable).parent / "crosscoder"
    done = subprocess.run([str(script), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"crosscoder {' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def main() -> None:
    assert Path(crosscoder.__file__).is_relative_to(sys.prefix), crosscoder.__file__
    print(command("doctor"))
    assert command("--version").strip() == crosscoder.__version__
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        x = np.random.default_rng(0).standard_normal((5000, 3, 16), dtype=np.float32)
        for split in ("train", "heldout"):
            crosscoder.ActivationStore.from_array(run / "activations" / split, x)
        command("train", str(run), "--n-features", "64", "--n-steps", "50", "--batch-size", "256", "--lr", "1e-3")
        print(command("eval", str(run)))
        model = crosscoder.Crosscoder.from_pretrained(run / "crosscoder")
        code = model.encode(torch.from_numpy(x[:10]))
        assert code.to_dense().shape == (10, 3, 64)
        assert model.decode(code).shape == (10, 3, 16)
    print("the installed wheel works")


if __name__ == "__main__":
    main()
