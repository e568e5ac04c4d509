"""How long a training step takes on a GPU: a model, no measurement. Nothing is run.

Each operation of a step is as slow as the slowest of what it needs: tensor cores, memory, second-level cache, or
instruction issue. The operations are those of `kernels/` and `backends/triton.py`; instructions are counted from the
compiled code (`tools/compile_gate.py`). No kernel runs at a limit, so a measured step is longer; the model says what
dominates, and what a measurement should be compared with.

Letters: B tokens, K snapshots, D width, F features, N pairs of token and feature that are on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["narrow", "sampled", "paper"]
"""The threshold's gradient: of pairs near the threshold, of every eighth feature, or of all and Adam on every row."""

PRODUCT_SHARE = 0.6
"""Share of the peak rate that large matrix products reach."""
MEMORY_SHARE = 0.8
"""The same for memory."""
CLOCK_SHARE = 0.86
"""Clock under load, as a share of the highest."""
CACHE_BYTES = 24.5
"""That the second-level cache gives a multiprocessor and clock: 5.5 TB/s on an H100."""
LANES_A_CLOCK = 4 * 32
"""Instructions that a multiprocessor issues a clock: four warps of 32 lanes."""
DECODE_INSTRUCTIONS = 14
"""A pair, snapshot and dimension, open or closed."""
UPDATE_INSTRUCTIONS = {"fp32": 36.0, "low-memory": 58.0}
"""A parameter of a row that is updated; counted (tools/compile_gate.py)."""
PAIR_INSTRUCTIONS = 5.0
"""A pair and parameter: 4.2 counted, and a turn for two pairs where there is one."""
WINDOW_INSTRUCTIONS = 10
"""A token, feature and snapshot of the threshold's gradient."""
SAMPLED_SHARE = 1 / 8


@dataclass(frozen=True)
class Gpu:
    """As its maker gives it: peak bf16 rate without sparsity, memory and its bandwidth, multiprocessors and clock."""

    tflops: float
    memory_gb: float
    memory_tb_per_s: float
    multiprocessors: int
    clock_ghz: float

    @property
    def product_flops(self) -> float:
        """Of large bf16 products, a second."""
        return PRODUCT_SHARE * self.tflops * 1e12

    @property
    def memory_bytes(self) -> float:
        """A second."""
        return MEMORY_SHARE * self.memory_tb_per_s * 1e12

    @property
    def clocks(self) -> float:
        """Of all multiprocessors, a second."""
        return self.multiprocessors * CLOCK_SHARE * self.clock_ghz * 1e9


GPUS = {
    "a100-40": Gpu(312, 40, 1.56, 108, 1.41),
    "a100": Gpu(312, 80, 2.04, 108, 1.41),
    "h100": Gpu(989, 80, 3.35, 132, 1.98),
    "h200": Gpu(989, 141, 4.8, 132, 1.98),
    "b200": Gpu(2250, 180, 8.0, 148, 1.97),
    "l40s": Gpu(362, 48, 0.86, 142, 2.52),
    "4090": Gpu(165, 24, 1.01, 128, 2.52),
}


@dataclass(frozen=True)
class Operation:
    """What one operation of a step needs."""

    name: str
    flops: float = 0.0
    """In bf16 on tensor cores."""
    memory_bytes: float = 0.0
    cache_bytes: float = 0.0
    instructions: float = 0.0
    """Of single lanes."""

    def limits(self, gpu: Gpu) -> dict[str, float]:
        """Seconds that each limit gives it."""
        return {
            "tensor cores": self.flops / gpu.product_flops,
            "memory": self.memory_bytes / gpu.memory_bytes,
            "cache": self.cache_bytes / (CACHE_BYTES * gpu.clocks),
            "instructions": self.instructions / (LANES_A_CLOCK * gpu.clocks),
        }

    def seconds(self, gpu: Gpu) -> float:
        return max(self.limits(gpu).values())

    def bound_by(self, gpu: Gpu) -> str:
        limits = self.limits(gpu)
        return max(limits, key=lambda name: limits[name])


@dataclass(frozen=True)
class Step:
    """One size of step."""

    B: int
    K: int
    D: int
    F: int
    low_memory: bool = False
    mode: Mode = "narrow"
    active: float = 40
    """Features a token that are on at some snapshot."""
    open_share: float = 0.5
    """Share of a pair's gates that are open."""
    touched: float = 0.8
    """Share of the features that fire in a batch, and so of the rows that are updated."""

    def operations(self) -> list[Operation]:
        """In their order."""
        n, pairs, w = self.K * self.D, self.B * self.active, 2 if self.low_memory else 4
        matrix, tokens = self.F * n, self.B * n
        rows = matrix * (1.0 if self.mode == "paper" else self.touched)
        bits = self.B * self.F / 8
        # Both matrices' weights and two moments, read and written; in fp32 the bf16 copy of W_enc is written too.
        moved = 2 * 2 * (2 + 1 + 1) if self.low_memory else 2 * 2 * (4 + 4 + 4) + 2
        state = "low-memory" if self.low_memory else "fp32"
        product = 2 * self.B * matrix
        return [
            Operation("whitening of the batch", memory_bytes=tokens * (2 + 4 + 2)),
            Operation("encode: product", product, 2 * matrix + 2 * tokens + 4 * self.B * self.F),
            Operation("encode: exact scores", memory_bytes=rows * w, cache_bytes=pairs * n * (w + 2)),
            Operation("encode: bits to code, transpose", cache_bytes=7 * bits + 1200 * pairs),
            Operation(
                "decode, residual, dots",
                memory_bytes=pairs * n * self.open_share * w + tokens * (2 + 4),
                cache_bytes=2 * pairs * n * self.open_share * w,
                instructions=DECODE_INSTRUCTIONS * pairs * n,
            ),
            Operation("pair gradients", memory_bytes=pairs * (4 * self.K + 40) + self.F * self.K * 8),
            *self._threshold(product),
            Operation(
                "update",
                memory_bytes=rows * moved + tokens * (2 + 4),
                cache_bytes=pairs * n * (2 + 4 * self.open_share),
                instructions=2 * rows * UPDATE_INSTRUCTIONS[state] + 2 * pairs * n * PAIR_INSTRUCTIONS,
            ),
        ]

    def _threshold(self, product: float) -> list[Operation]:
        if self.mode == "narrow":
            return []  # from the pairs that are there
        share = SAMPLED_SHARE if self.mode == "sampled" else 1.0
        dots = share * self.B * self.F * self.K
        # With float32 weights, on all tokens: h once more, and both of three products of split numbers.
        split = self.mode == "paper" and not self.low_memory
        products, width = (6, 4) if split else (1, 2)
        read = share * self.F * self.K * self.D * 4
        return [
            Operation("threshold: product of residual and decoders", products * share * product, products * read),
            Operation("threshold: window", memory_bytes=2 * width * dots, instructions=WINDOW_INSTRUCTIONS * dots),
        ]

    def seconds(self, gpu: Gpu) -> float:
        """Of the whole step."""
        return sum(operation.seconds(gpu) for operation in self.operations())

    def dense_seconds(self, gpu: Gpu) -> float:
        """Of dense torch in bf16: five products, and weights, gradients and moments read and written once."""
        matrix = self.F * self.K * self.D
        return 5 * 2 * self.B * matrix / gpu.product_flops + 2 * matrix * 2 * (2 + 2 + 2 + 2) / gpu.memory_bytes
