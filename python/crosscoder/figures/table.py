"""A figure as a table of columns: the one source of the page's plots, the SVG and the CSV files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crosscoder.figures.spec import Spec

Column = list[Any]
MOST_POINTS = 2_000
"""Features that a figure draws one by one; of more, so many are drawn at random."""


@dataclass(frozen=True)
class FigureTable:
    """One figure: what it shows, whose definition it uses, its numbers as columns of equal length, how to draw them."""

    key: str
    title: str
    definition: str
    """"paper", "ours", "both" (some series are the paper's, some ours) or "standard" (neither)."""
    caption: str
    columns: Mapping[str, Column]
    spec: Spec | None = None
    """None where the figure has drawing functions of its own."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Reference lines and the like, by name."""
    wide: bool = False
    """Whether it takes the whole width of the page."""
    section: str = ""
    """The heading that it stands under; whoever collects figures sets it (see `results.Part`)."""


def plain_column(values: Any) -> Column:
    """Python numbers to six digits; NaN becomes None."""
    array = np.asarray(values)
    if array.dtype.kind in "iub":
        return [int(value) for value in array]
    return [None if np.isnan(value) else float(f"{value:.6g}") for value in array.astype(np.float64)]


def drawn(candidates: Any, most: int = MOST_POINTS) -> tuple[np.ndarray, str]:
    """The features that a figure draws, all or `most` at random (always the same), and a sentence that says so."""
    rows = np.asarray(candidates)
    if len(rows) <= most:
        return rows, f"All {len(rows):,} features are drawn."
    chosen = np.sort(np.random.default_rng(0).choice(rows, most, replace=False))
    return chosen, f"{most:,} of {len(rows):,} features are drawn, chosen at random; numbers in words are over all."


BINS = 20
"""Bars of a histogram over [0, 1]."""


def histogram(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Middles of `BINS` equal bars over [0, 1], and how many of the known values each holds (ends are clipped)."""
    edges, known = np.linspace(0, 1, BINS + 1), np.asarray(values)
    return (edges[:-1] + edges[1:]) / 2, np.histogram(known[np.isfinite(known)].clip(0, 1), edges)[0]
