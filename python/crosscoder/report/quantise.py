"""Numbers as small integers. `assets/decode.js` holds the inverse; readers of the page see this error."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8] | NDArray[np.uint16]
Floats = NDArray[np.floating[Any]]


def _integer_type(bits: int) -> type[np.uint8] | type[np.uint16]:
    if bits not in (8, 16):
        raise ValueError(f"bits must be 8 or 16, not {bits}")
    return np.uint8 if bits == 8 else np.uint16


def linear_codes(values: Floats, low: float, high: float, bits: int, *, keep_positive: bool = False) -> Codes:
    """Codes 0 ... 2^bits - 1 spread evenly over [low, high]; values outside are clipped.

    A code stands for low + code (high - low) / (2^bits - 1), which is off by half a step at most. With `keep_positive`
    (for low = 0) no value above 0 becomes 0: what fires stays visible; the smallest may then be off by a whole step.
    """
    dtype = _integer_type(bits)
    top = 2**bits - 1
    span = high - low
    scaled = (np.asarray(values, dtype=np.float64) - low) * (top / span if span > 0 else 0.0)
    codes: Codes = np.rint(np.clip(scaled, 0, top)).astype(dtype)
    if keep_positive:
        codes[(codes == 0) & (scaled > 0)] = 1
    return codes
