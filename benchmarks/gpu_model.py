"""What the model of a step's time (`crosscoder.step_time`) says of each operation, for Pythia's sizes.

python benchmarks/gpu_model.py --gpu h100

Modelled, not measured: no kernel runs at a limit.
"""

from __future__ import annotations

import argparse
from typing import get_args

from crosscoder.step_time import GPUS, Mode, Step

SIZES = {
    "Pythia-6.9B, F = 32,768, low-memory state": (2048, 32, 4096, 32_768, True),
    "Pythia-160M, F = 98,304, fp32 state": (2048, 32, 768, 98_304, False),
    "Pythia-160M, F = 98,304, low-memory state": (2048, 32, 768, 98_304, True),
}
"""B, K, D, F, low memory."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=list(GPUS), default="h100")
    gpu = GPUS[parser.parse_args().gpu]
    for title, size in SIZES.items():
        for mode in get_args(Mode):
            step = Step(*size, mode=mode)
            print(
                f"{title}, {mode}: {1e3 * step.seconds(gpu):.1f} ms, dense bf16 {1e3 * step.dense_seconds(gpu):.0f} ms "
                f"(B = {step.B:,}, K = {step.K}, D = {step.D:,}, {step.active:g} active, "
                f"{step.touched:.0%} of rows touched)"
            )
            for operation in step.operations():
                took = f"{1e3 * operation.seconds(gpu):8.2f} ms"
                print(f"  {operation.name:44} {took}  {operation.bound_by(gpu)}")
            print()


if __name__ == "__main__":
    main()
