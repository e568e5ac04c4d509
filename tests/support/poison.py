"""Memory that is handed out unfilled holds what no result may depend on.

A buffer of which one element is never written goes unnoticed while the allocator happens to return zeros. Within
`poisoned()` such an element is NaN, or the largest number of its type:

- torch fills what it makes without a value: `empty`, `new_empty`, `empty_strided`, a `resize_` that grows, ...;
- `np.empty` and `np.empty_like` do the same;
- the C library (glibc) overwrites blocks of more than about a kilobyte when it hands them out and when it takes them
  back, which covers the arrays that C++ makes, and reads after a free.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np
import torch

_M_PERTURB = -6
_BYTE = 0x01
"""Blocks are handed out full of its complement, 0xFE: -1.7e38 in float32, -16,843,010 in int32."""


def _filled(make: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    @wraps(make)
    def filled(*args: Any, **kwargs: Any) -> np.ndarray:
        array = make(*args, **kwargs)
        kind = array.dtype.kind
        if kind in "fc":
            array.fill(np.nan)
        elif kind in "iu":
            array.fill(np.iinfo(array.dtype).max)
        elif kind == "b":
            array.fill(True)
        return array

    return filled


def _perturb(byte: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl has not
    if mallopt is not None:
        mallopt(_M_PERTURB, byte)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what is handed out unfilled, within."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    empty, empty_like = np.empty, np.empty_like
    # torch fills only while deterministic algorithms are asked for; those that do not exist shall still run.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    np.empty, np.empty_like = _filled(empty), _filled(empty_like)  # type: ignore[assignment]
    _perturb(_BYTE)
    try:
        yield
    finally:
        _perturb(0)
        np.empty, np.empty_like = empty, empty_like
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
