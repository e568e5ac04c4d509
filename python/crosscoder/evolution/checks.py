"""Small things that several analyses share: checks of inputs, a safe inverse."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from crosscoder.errors import DataError
from crosscoder.model import Crosscoder

Decoders = Tensor | Crosscoder
"""What analyses of decoders take: W_dec (F, K, D), or the crosscoder itself."""


def decoders_of(source: Decoders) -> Tensor:
    """W_dec (F, K, D)."""
    return source.W_dec.detach() if isinstance(source, Crosscoder) else source


def checked_steps(steps_K: ArrayLike) -> NDArray[np.int64]:
    """Training steps as int64 (K,). Raises `DataError` unless they are whole numbers, increase from 0 or more, and K is
    at least 1."""
    given = np.asarray(steps_K)
    if given.dtype.kind not in "iuf" or not (np.isfinite(given) & (given == np.floor(given))).all():
        raise DataError(f"training steps must be whole numbers, got {given.tolist()}")
    steps = given.astype(np.int64)
    if steps.ndim != 1 or steps.size == 0 or steps[0] < 0 or (np.diff(steps) <= 0).any():
        raise DataError(f"training steps must increase strictly from 0 or more, got {steps.tolist()}")
    return steps


def checked_decoders(W_dec: Tensor) -> tuple[int, int, int]:
    """(F, K, D) of decoders. Raises `DataError` if they are not a floating (F, K, D) tensor."""
    if W_dec.ndim != 3 or not W_dec.is_floating_point() or 0 in W_dec.shape:
        raise DataError(f"decoders must be a floating point (F, K, D) tensor, got {tuple(W_dec.shape)} {W_dec.dtype}")
    n_features, n_snapshots, width = W_dec.shape
    return n_features, n_snapshots, width


def checked_mask(mask: ArrayLike | None, n_features: int, name: str = "alive_F") -> NDArray[np.bool_]:
    """A mask as (F,) bool; None is all. Raises `DataError` if it has another shape."""
    chosen = np.ones(n_features, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    if chosen.shape != (n_features,):
        raise DataError(f"{name} has shape {chosen.shape}, expected ({n_features},)")
    return chosen


def checked_masks(masks: Mapping[str, ArrayLike] | None, n_features: int) -> dict[str, NDArray[np.bool_]]:
    """Masks as (F,) bool arrays. Raises `DataError` if one has another shape."""
    return {name: checked_mask(mask, n_features, f"mask {name!r}") for name, mask in (masks or {}).items()}


def inverse(norms: Tensor) -> Tensor:
    """1 / norm, and 0 where the norm is 0 (or so small that its inverse is infinite)."""
    return torch.where(norms > torch.finfo(norms.dtype).tiny, 1 / norms, 0)
