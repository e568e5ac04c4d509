"""The seeds of everything random in a step: a hash of the run's seed, the step and the purpose.

A sum of multiples will not do: two seeds then share their numbers at shifted steps.
"""

from __future__ import annotations

from enum import IntEnum

_MASK = 2**64 - 1


class Purpose(IntEnum):
    """What a step's random numbers are for."""

    STEP = 0
    """The tokens of threshold_mode "sampled", and stochastic rounding."""
    REVIVAL = 1
    """The tokens from whose residuals dead features restart."""


def step_seed(seed: int, step: int, purpose: Purpose) -> int:
    """63 bits from the three: splitmix64's output function (Steele et al. 2014), one field after the other."""
    state = 0
    for field in (seed, step, int(purpose)):
        state = _splitmix64(state ^ (field & _MASK))
    return state >> 1


def _splitmix64(state: int) -> int:
    """One number of splitmix64: a bijection of 64 bits."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
