"""The sections of the page, in the order that tells the story."""

from __future__ import annotations

from collections.abc import Iterable

from crosscoder.figures.table import FigureTable

STRENGTH = "Strength and life"
ROTATION = "Rotation"
DIMENSIONALITY = "Dimensionality"
NGRAMS = "N-gram phase"
TYPES = "Feature types"
COMPLEXITY = "Complexity"
HONESTY = "Honesty of the norm"
STABILITY = "Stability across runs"
CROSSCODER = "The crosscoder and its baselines"

SECTIONS = (STRENGTH, ROTATION, DIMENSIONALITY, NGRAMS, TYPES, COMPLEXITY, HONESTY, STABILITY, CROSSCODER)


def in_order(tables: Iterable[FigureTable]) -> list[FigureTable]:
    """Figures by section, in the given order within one; sections that are not known (tasks) come last."""
    place = {name: index for index, name in enumerate(SECTIONS)}
    return sorted(tables, key=lambda table: place.get(table.group, len(SECTIONS)))
