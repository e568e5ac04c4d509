"""When a task is above chance."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CHANCE_P = 0.001
"""A task is above chance where so many right answers would come by chance with a smaller probability than this."""


def chance_probability(n_right: int, n: int) -> float:
    """Probability of at least `n_right` right answers of `n` by tossing a coin."""
    from scipy.stats import binom

    return float(binom.sf(n_right - 1, n, 0.5))


def above_chance(metric_P: Floats) -> bool:
    """Whether prompts are answered right (metric above 0) more often than chance explains, and in the mean."""
    n_right = int((metric_P > 0).sum())
    return chance_probability(n_right, len(metric_P)) < CHANCE_P and float(metric_P.mean()) > 0
