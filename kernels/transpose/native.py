"""A code's pairs sorted by feature on a CPU: a counting sort, the same for any number of threads."""

from __future__ import annotations

from typing import Any

import torch

from crosscoder import _core
from crosscoder.code import SparseCode
from crosscoder.kernels.arrays import arrays, code_arrays, n_threads
from crosscoder.kernels.transpose.reference import FeatureOrder


def transpose(code: SparseCode) -> FeatureOrder:
    """The stable order of a code's pairs by feature."""
    return FeatureOrder(*map(torch.from_numpy, _core.transpose(code_arrays(code), n_threads())))


def order_arrays(order: FeatureOrder) -> tuple[Any, Any, Any]:
    """The order of a code's pairs by feature as the core takes it."""
    return arrays(order.feature_offsets, order.tokens, order.order)
