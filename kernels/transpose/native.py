"""A code's pairs sorted by feature on a CPU: a counting sort, the same for any number of threads."""

from __future__ import annotations

import torch

from crosscoder import _core
from crosscoder.code import SparseCode
from crosscoder.kernels.arrays import code_arrays, n_threads
from crosscoder.kernels.transpose.reference import FeatureOrder


def transpose(code: SparseCode) -> FeatureOrder:
    """The stable order of a code's pairs by feature."""
    return FeatureOrder(*map(torch.from_numpy, _core.transpose(code_arrays(code), n_threads())))
