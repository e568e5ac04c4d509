"""torch tensors as the numpy arrays that the C++ core takes: views, never copies. bf16 is passed as its bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosscoder.code import SparseCode

Array = np.ndarray[Any, Any]


def array(tensor: Tensor) -> Array:
    """The tensor's memory."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.view(torch.int16).numpy().view(np.uint16)
        return bits
    values: Array = tensor.numpy()
    return values


def array_or_none(tensor: Tensor | None) -> Array | None:
    """`array`, or None."""
    return None if tensor is None else array(tensor)


def code_arrays(code: SparseCode) -> tuple[Array, Array, Array, Array, int, int]:
    """A sparse code as the core takes it."""
    return (
        array(code.row_offsets),
        array(code.features),
        array(code.values),
        array(code.gates),
        code.n_snapshots,
        code.n_features,
    )


def n_threads() -> int:
    """Threads that C++ may compute with, everywhere: as many as torch (`torch.set_num_threads`, OMP_NUM_THREADS)."""
    return torch.get_num_threads()
