"""A code's pairs sorted by feature, tokens ascending within a feature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosscoder.code import SparseCode, offsets_of


@dataclass(frozen=True)
class FeatureOrder:
    """Where the pairs of each feature are."""

    feature_offsets: Tensor
    """(F + 1,) int64: the pairs of feature f are `feature_offsets[f]` to `feature_offsets[f + 1]`."""
    tokens: Tensor
    """(N,) int32: token of each pair, feature by feature."""
    order: Tensor
    """(N,) int64: `values[order]` are a code's values feature by feature."""


def transpose(code: SparseCode) -> FeatureOrder:
    """The stable order of a code's pairs by feature."""
    features, order = torch.sort(code.features, stable=True)
    return FeatureOrder(
        feature_offsets=offsets_of(features.long(), code.n_features),
        tokens=code.rows()[order].to(torch.int32),
        order=order,
    )
