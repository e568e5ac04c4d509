"""What the figures of analyses are made from: their arrays and tables, as far as a run has them.

Letters: F features, K snapshots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from crosscoder.common.arrays import Arrays
from crosscoder.evolution.strength import KIND_NAMES
from crosscoder.figures.table import Column, FigureTable, plain_column

R = TypeVar("R")
SHOWN_KINDS = ("initialization", "emergent")
"""Kinds of features that figures tell apart."""


@dataclass(frozen=True)
class Results:
    """What the figures are made from."""

    steps: np.ndarray
    """(K,)"""
    arrays: Mapping[str, Arrays]
    """Analysis -> its result."""
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Columns of results that are tables: "explanations", "sweep"."""
    comparisons: Mapping[str, Arrays] = field(default_factory=dict)
    """Name of another run -> this one's dictionary matched with its (`stability.Stability`, flat)."""
    induction_length: int | None = None
    """Random tokens that are said twice, where induction was measured."""
    found: Mapping[type, Any] = field(default_factory=dict)
    """Type of an analysis' result -> the result, of those that the run has."""

    def of(self, kind: type[R]) -> R | None:
        """The result of that type, such as `LifeResult`, or None where the run has none."""
        result: R | None = self.found.get(kind)
        return result

    def get(self, name: str, *keys: str) -> list[Any] | None:
        """The arrays `keys` of analysis `name`, or None if one is not there."""
        found = self.arrays.get(name, {})
        return [found[key] for key in keys] if all(key in found for key in keys) else None

    @property
    def kinds(self) -> dict[str, np.ndarray]:
        """Kind -> (F,) bool, for the kinds that figures show and that have features."""
        known = self.get("life", "cycles.kind")
        masks = {} if known is None else {name: known[0] == KIND_NAMES.index(name) for name in SHOWN_KINDS}
        return {name: mask for name, mask in masks.items() if mask.any()}

    def emergence_step(self) -> np.ndarray | None:
        """(F,) training step of emergence, NaN where there is none."""
        found = self.get("life", "cycles.emergence")
        return None if found is None else np.where(found[0] >= 0, self.steps[found[0]], np.nan)

    @property
    def by_snapshot(self) -> dict[str, Column]:
        """The columns that every table over snapshots begins with."""
        return {"snapshot": list(range(len(self.steps))), "step": plain_column(self.steps)}


Maker = Callable[[Results], FigureTable | None]
