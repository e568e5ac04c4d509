"""The turning point of decoder directions as the page has it: whether it is one at all."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def is_split(point: Mapping[str, float]) -> bool:
    """Whether the snapshots fall in two parts more clearly than in shuffled order (p of at most 0.05)."""
    return bool(np.isfinite(point["step"])) and point["p_shuffled"] <= 0.05


def is_sharp(point: Mapping[str, float]) -> bool:
    """Whether such a split is a turn: a steady drift explains less of the cosines than it does."""
    return is_split(point) and point["explained_by_blocks"] > point["explained_by_lag"]


def turning_figures(rotation: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The numbers of `rotation.TurningPoint` in the flat result of the analysis."""
    prefix = "turning_point."
    return {
        name.removeprefix(prefix): float(value)
        for name, value in rotation.items()
        if name.startswith(prefix) and value.ndim == 0 and value.dtype.kind in "fi"
    }
