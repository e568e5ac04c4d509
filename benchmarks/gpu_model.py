"""Bytes and FLOPs of each kernel, and the time that an H100's limits give them.

python benchmarks/gpu_model.py

A model, not a measurement: no kernel runs at a limit. It says what dominates, and what a measurement should be
compared with. Limits: 600 TFLOP/s in bf16 (a third of that counted for three tf32 products a float32 product, halved
again for tf32's rate), 3.35 TB/s of memory, 5.5 TB/s of second-level cache.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

BF16_FLOPS, TF32X3_FLOPS, MEMORY, CACHE = 600e12, 100e12, 3.35e12, 5.5e12


@dataclass(frozen=True)
class Load:
    """What one operation of a step moves and computes."""

    name: str
    flops: float
    memory_bytes: float
    cache_bytes: float
    flops_per_second: float = BF16_FLOPS

    def seconds(self) -> float:
        """The slowest of its three limits."""
        return max(self.flops / self.flops_per_second, self.memory_bytes / MEMORY, self.cache_bytes / CACHE)


@dataclass(frozen=True)
class Case:
    """One size of step."""

    B: int
    K: int
    D: int
    F: int
    active: float = 40
    """Features a token that are on at some snapshot."""
    open_share: float = 0.5
    """Share of a pair's gates that are open."""
    touched: float = 0.5
    """Share of the features that fire in a batch."""
    low_memory: bool = False
    x_bytes: int = 2

    def loads(self) -> list[Load]:
        n, pairs = self.K * self.D, self.B * self.active
        w = 2 if self.low_memory else 4
        matrix, rows = self.F * n, self.touched * self.F * n
        tokens = self.B * n
        # A row of one matrix, read and written: weights, two moments, and the bf16 copy of W_enc.
        state = 2 * (2 * (2 + 1 + 1)) if self.low_memory else 2 * (2 * (4 + 4 + 4)) + 2
        rate = BF16_FLOPS if self.low_memory else TF32X3_FLOPS
        bits = self.B * self.F / 8
        return [
            Load("encode: product", 2 * self.B * matrix, 2 * matrix + 2 * tokens, 4 * self.B * self.F),
            Load(
                "encode: exact scores", 2 * pairs * n, rows * w + tokens * self.x_bytes,
                pairs * n * (w + self.x_bytes),
            ),
            Load("encode: bits to code", 0, 0, 4 * bits + 200 * pairs),
            Load("transpose", 0, 0, 3 * bits + 1000 * pairs),
            Load(
                "decode + residual + dots", 4 * pairs * n * self.open_share,
                pairs * n * self.open_share * w + tokens * (self.x_bytes + 4), 2 * pairs * n * self.open_share * w,
            ),
            Load("pair gradients", 60 * pairs * self.K, pairs * (4 * self.K + 40) + self.F * self.K * 8, 0),
            Load("threshold, exact", 4 * self.B * matrix, 2 * matrix * w, 0, rate),
            Load("threshold, sampled 1/8", self.B * matrix / 2, 2 * matrix * w, 0, rate),
            Load(
                "update", 2 * pairs * n * (1 + self.open_share), rows * state + tokens * (self.x_bytes + 4),
                pairs * n * (self.x_bytes + 4 * self.open_share),
            ),
        ]  # fmt: skip


CASES = {
    "Pythia-160M, F=98,304, fp32 state": Case(2048, 32, 768, 98_304),
    "Pythia-160M, F=98,304, low-memory state": Case(2048, 32, 768, 98_304, low_memory=True),
    "Pythia-6.9B, F=32,768, low-memory state": Case(2048, 32, 4096, 32_768, low_memory=True, touched=0.8),
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for title, case in CASES.items():
        print(
            f"{title}: B={case.B}, K={case.K}, D={case.D}, {case.active} active, {case.touched:.0%} of features touched"
        )
        total = 0.0
        for load in case.loads():
            if not load.name.startswith("threshold, exact"):
                total += load.seconds()
            print(
                f"  {load.name:32} {load.flops / 1e12:8.2f} TFLOP {load.memory_bytes / 1e9:8.2f} GB memory "
                f"{load.cache_bytes / 1e9:8.2f} GB cache {1e3 * load.seconds():8.2f} ms"
            )
        print(f"  {'whole step, sampled thresholds':32} {1e3 * total:.1f} ms\n")


if __name__ == "__main__":
    main()
