"""Frontiers of explained variance against L0, compared where they overlap.

A frontier is what one method reaches with one F and seed over all values of lambda and of the learning rate: the points
that no other of these dominates (as sparse, and explaining as much). The same lambda gives other methods another L0, so
methods are compared at a common L0: frontiers are interpolated linearly in log L0 between their points, never beyond
them. Letters: P points of a frontier, G common L0 values, S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crosscoder.errors import DataError

GRID = 5


@dataclass(frozen=True)
class Frontier:
    """A method's frontier at one F and one seed."""

    l0_P: NDArray[np.float64]
    """Rising, above 0."""
    explained_P: NDArray[np.float64]
    """Rising."""

    @classmethod
    def of(cls, l0: Sequence[float], explained: Sequence[float]) -> Frontier:
        """From points in any order; those without any active feature have no place on a log axis and are left out."""
        kept: list[tuple[float, float]] = []
        for a, b in sorted(zip(l0, explained, strict=True), key=lambda pair: (pair[0], -pair[1])):
            if a > 0 and (not kept or b > kept[-1][1]):
                kept.append((a, b))
        return cls(np.array([a for a, _ in kept]), np.array([b for _, b in kept]))

    def at(self, l0_G: NDArray[np.float64]) -> NDArray[np.float64]:
        """(G,) explained variance at other values of L0. Raises `DataError` for values outside of the frontier."""
        if not len(self.l0_P) or l0_G.min() < self.l0_P[0] * (1 - 1e-9) or l0_G.max() > self.l0_P[-1] * (1 + 1e-9):
            raise DataError("a frontier is interpolated between its points, not beyond them")
        return np.interp(np.log(l0_G), np.log(self.l0_P), self.explained_P)


@dataclass(frozen=True)
class Comparison:
    """Several methods at common values of L0."""

    l0_G: NDArray[np.float64]
    """(G,): from the smallest to the largest L0 that all frontiers reach, evenly in log L0. Empty if they do not
    overlap."""
    explained_SG: Mapping[str, NDArray[np.float64]]
    """(S, G) for each method."""

    def difference(self, method: str, other: str) -> NDArray[np.float64]:
        """(S, G): explained variance of `method` minus that of `other`, seed by seed."""
        return np.asarray(self.explained_SG[method] - self.explained_SG[other])


def compare(frontiers: Mapping[str, Sequence[Frontier]], n: int = GRID) -> Comparison:
    """Methods (each with a frontier for every seed, in the same order) at `n` values of L0 that all of them reach."""
    every = [frontier for of_method in frontiers.values() for frontier in of_method]
    low = max((frontier.l0_P[0] if len(frontier.l0_P) else np.inf for frontier in every), default=np.inf)
    high = min((frontier.l0_P[-1] if len(frontier.l0_P) else 0.0 for frontier in every), default=0.0)
    if not low < high:
        return Comparison(np.empty(0), {method: np.empty((len(some), 0)) for method, some in frontiers.items()})
    l0_G = np.geomspace(low, high, n)
    return Comparison(l0_G, {method: np.stack([one.at(l0_G) for one in some]) for method, some in frontiers.items()})
