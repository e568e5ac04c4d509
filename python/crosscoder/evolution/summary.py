"""Values for `summary.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def finite(value: Any) -> float | int | None:
    """A number for JSON, which has no NaN: None for one that is not finite."""
    number = float(value)
    return None if not np.isfinite(number) else int(value) if isinstance(value, int) else number


def by_snapshot(revisions: Sequence[str], values_K: np.ndarray) -> dict[str, float]:
    """Revision -> value."""
    return {name: float(value) for name, value in zip(revisions, values_K, strict=True)}
