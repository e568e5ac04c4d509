"""A figure as a table of columns: the one source of the page's plots, the SVG and the CSV files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Column = list[Any]


@dataclass(frozen=True)
class FigureTable:
    """One figure: what it shows, whose definition it uses, and its numbers as columns of equal length."""

    key: str
    group: str
    title: str
    definition: str
    """"paper", "ours", "both" (some series are the paper's, some ours) or "standard" (neither)."""
    caption: str
    columns: Mapping[str, Column]
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Reference lines and the like, by name."""


def plain_column(values: Any) -> Column:
    """Python numbers to six digits; NaN becomes None."""
    array = np.asarray(values)
    if array.dtype.kind in "iub":
        return [int(value) for value in array]
    return [None if np.isnan(value) else float(f"{value:.6g}") for value in array.astype(np.float64)]
