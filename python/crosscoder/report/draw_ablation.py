"""The SVG figure of ablation curves, the one that no general kind can draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from crosscoder.common.svg import COLOURS, DASHES, floats, log_steps
from crosscoder.figures.table import FigureTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_K = (10, 50)
"""Sizes of the sets drawn against training steps."""
SETS = {"top": "top", "random": "matched random", "active": "random, as active"}


def _ablation(figure: Figure, table: FigureTable) -> None:
    """Rows: kinds of ablation. Left: drop against k at the last snapshot; right: drop at some k against steps."""
    columns = {name: np.array(column, dtype=object) for name, column in table.columns.items()}
    kinds = list(dict.fromkeys(columns["ablation"].tolist()))
    figure.set_size_inches(8.8, 3.2 * len(kinds))
    grid = figure.subplots(len(kinds), 2, squeeze=False)
    last = columns["snapshot"].max()
    for (left, right), kind in zip(grid, kinds, strict=True):
        for index, (name, label) in enumerate(SETS.items()):
            rows = (columns["ablation"] == kind) & (columns["set"] == name)
            style = {"color": COLOURS[index], "linestyle": DASHES[index], "marker": "o", "markersize": 2.5}
            at_end = rows & (columns["snapshot"] == last)
            left.plot(floats(columns["k"][at_end]), floats(columns["drop"][at_end]), label=label, **style)
            low, high = (floats(columns[f"drop_{end}"][at_end]) for end in ("low", "high"))
            left.fill_between(floats(columns["k"][at_end]), low, high, color=COLOURS[index], alpha=0.14, linewidth=0)
            for k in SHOWN_K:
                at_k = rows & (columns["k"] == k)
                if at_k.any():
                    style["alpha"] = 1.0 if k == SHOWN_K[-1] else 0.45
                    right.plot(
                        floats(columns["step"][at_k]), floats(columns["drop"][at_k]), label=f"{label}, k = {k}", **style
                    )
        left.set_xscale("log")
        left.set_xlabel("features ablated")
        left.set_ylabel(f"drop, {kind} ablation")
        log_steps(right, sorted({int(step) for step in columns["step"]}))
        left.legend()
        if right.lines:
            right.legend(fontsize=6.5)


DRAW_OWN: dict[str, Callable[[Figure, FigureTable], None]] = {"ablation": _ablation}
"""Kinds of figures that no general kind (`draw.py`) can draw."""
