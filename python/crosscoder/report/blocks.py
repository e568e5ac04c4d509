"""Binary arrays inside an HTML file: little-endian bytes, gzip, base64, one inert script element each."""

from __future__ import annotations

import base64
import gzip
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosscoder.report.quantise import linear_codes

_LEVEL = 6
_FEW_VALUES = 1 << 20
"""Arrays up to this many values are kept with 16 bits, larger ones with 8."""


class Blocks:
    """Collects arrays; `html` are their elements. Each `add_*` returns how the page reads its array back."""

    def __init__(self, prefix: str = "block") -> None:
        self._prefix = prefix
        self._elements: list[bytes] = []
        self.n_bytes = 0

    def add_bytes(self, data: bytes) -> str:
        """Store bytes; returns the id of their element."""
        name = f"{self._prefix}-{len(self._elements)}"
        # mtime=0: the same data give the same file
        text = base64.b64encode(gzip.compress(data, _LEVEL, mtime=0))
        element = b'<script type="application/octet-stream" id="' + name.encode() + b'">' + text + b"</script>\n"
        self._elements.append(element)
        self.n_bytes += len(element)
        return name

    def add_raw(self, array: NDArray[Any], dtype: str) -> dict[str, Any]:
        """Store an array as it is, as `dtype` ("uint8", "uint16", "int32", "float32")."""
        values = np.ascontiguousarray(array, dtype=np.dtype(dtype).newbyteorder("<"))
        return {"block": self.add_bytes(values.tobytes()), "type": dtype, "shape": list(values.shape)}

    def add_linear(
        self, array: NDArray[Any], low: float, high: float, *, keep_positive: bool = False
    ) -> dict[str, Any]:
        """Store values of [low, high] as 8 or 16 bit codes (see `linear_codes`)."""
        bits = 16 if array.size <= _FEW_VALUES else 8
        stored = self.add_raw(linear_codes(array, low, high, bits, keep_positive=keep_positive), f"uint{bits}")
        return {**stored, "low": low, "high": high}

    def extend(self, other: Blocks) -> None:
        """Take over the elements of `other`, which has another prefix."""
        self._elements.extend(other._elements)
        self.n_bytes += other.n_bytes

    @property
    def html(self) -> bytes:
        """All elements, one a line."""
        return b"".join(self._elements)
