"""torch tensors as the numpy arrays that the C++ core takes: views, never copies. bf16 is passed as its bits."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from crosscoder.code import SparseCode

Array = np.ndarray[Any, Any]
Perhaps = Tensor | None


def array(tensor: Tensor) -> Array:
    """The tensor's memory."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy().view(np.uint16)
        return bits
    values: Array = tensor.numpy()
    return values


@overload
def arrays(a: Perhaps, b: Perhaps, /) -> tuple[Any, Any]: ...
@overload
def arrays(a: Perhaps, b: Perhaps, c: Perhaps, /) -> tuple[Any, Any, Any]: ...
@overload
def arrays(a: Perhaps, b: Perhaps, c: Perhaps, d: Perhaps, /) -> tuple[Any, Any, Any, Any]: ...
@overload
def arrays(*tensors: Perhaps) -> tuple[Any, ...]: ...
def arrays(*tensors: Perhaps) -> tuple[Any, ...]:
    """`array` of each; None stays None. Type checkers count up to four, for calls with more arguments behind."""
    return tuple(None if tensor is None else array(tensor) for tensor in tensors)


def code_arrays(code: SparseCode) -> tuple[Any, Any, Any, Any, int, int]:
    """A sparse code as the core takes it."""
    return *arrays(code.row_offsets, code.features, code.values, code.gates), code.n_snapshots, code.n_features


def n_threads() -> int:
    """Threads that C++ may compute with, everywhere: as many as torch (`torch.set_num_threads`, OMP_NUM_THREADS)."""
    return torch.get_num_threads()
