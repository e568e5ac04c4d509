"""Slow, obvious versions of what the package computes fast."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosscoder.evolution import NgramCounts


def counts_of(ids_SC: NDArray[Any], vocab_size: int) -> NgramCounts:
    """N-gram counts by numpy alone."""
    key = ids_SC[:, :-1].astype(np.int64) * vocab_size + ids_SC[:, 1:]
    pairs, count = np.unique(key, return_counts=True)
    return NgramCounts(
        unigrams=np.bincount(ids_SC.ravel(), minlength=vocab_size),
        first=(pairs // vocab_size).astype(np.int32),
        second=(pairs % vocab_size).astype(np.int32),
        count=count,
    )
