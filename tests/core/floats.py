"""Numpy references of the conversions, and inputs that reach every corner of the formats."""

from __future__ import annotations

import numpy as np

from crosscoder import _core

FP32_CORNERS = np.array(
    [
        0x00000000, 0x80000000,  # zeros
        0x00000001, 0x80000001, 0x007FFFFF, 0x00008000, 0x00018000,  # denormals, two of them ties
        0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F8000,  # smallest normal, largest; those round to infinity
        0x7F800000, 0xFF800000,  # infinities
        0x7F800001, 0xFF800001, 0x7FC00000, 0x7FFFFFFF, 0x7F80FFFF, 0xFFFF8000,  # NaN, some would carry
        0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001,  # ties to even, and beside them
    ],
    dtype=np.uint32,
).view(np.float32)  # fmt: skip

SIZES = [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 100, 257]
"""Below, at and above the width of every instruction set's registers."""


def all_halves() -> np.ndarray:
    """(65536,) uint16: every bit pattern of a 16-bit float."""
    return np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


def widened(bits: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values of `bits` in "bf16", "fp16" or "fp32"."""
    if dtype == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32) if dtype == "fp16" else bits


def narrowed(values: np.ndarray) -> np.ndarray:
    """Bits of bfloat16(values), by exact arithmetic on the neighbours instead of the usual bit trick."""
    bits = values.view(np.uint32)
    below = (bits >> 16).astype(np.uint16)
    remainder = bits & 0xFFFF
    up = (remainder > 0x8000) | ((remainder == 0x8000) & (below & 1 == 1))
    rounded = below + up.astype(np.uint16)
    return np.where(np.isnan(values), below | 0x40, rounded).astype(np.uint16)


def same_floats(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bits, where any NaN equals any other."""
    both_nan = np.isnan(a) & np.isnan(b)
    return a.shape == b.shape and bool(np.all((a.view(np.uint32) == b.view(np.uint32)) | both_nan))


def fingerprint() -> int:
    """XXH3 of the bits (NaN included) of all conversions over all corners and sizes, at the current level."""
    rng = np.random.default_rng(0)
    parts = []
    for scale in (1.0, -0.3, 1e-38, 3e38):
        for size in SIZES:
            wide = rng.integers(0, 1 << 32, (5, size), dtype=np.uint32).view(np.float32)
            for dtype, source in (
                ("fp32", wide),
                ("bf16", rng.integers(0, 1 << 16, (5, size), dtype=np.uint16)),
                ("fp16", rng.integers(0, 1 << 16, (5, size), dtype=np.uint16)),
            ):
                out = np.zeros((3, 2, size), dtype=np.float32)
                _core.gather_rows(source, np.array([4, 0, 4]), scale, out, 1, dtype)
                parts.append(out.tobytes())
            bits = np.zeros(wide.shape, dtype=np.uint16)
            _core.float32_to_bfloat16(wide, bits)
            parts.append(bits.tobytes())
        for dtype in ("bf16", "fp16"):
            out = np.zeros((1, 1, 1 << 16), dtype=np.float32)
            _core.gather_rows(all_halves()[None], np.zeros(1, np.int64), scale, out, 0, dtype)
            parts.append(out.tobytes())
    corners = np.zeros(FP32_CORNERS.shape, dtype=np.uint16)
    _core.float32_to_bfloat16(FP32_CORNERS, corners)
    return _core.xxh3_64(b"".join([*parts, corners.tobytes()]))


if __name__ == "__main__":
    print(_core.isa_level(), fingerprint())
