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
