"""The figures of tasks for the SVG files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from crosscoder.report.svg import COLOURS, DASHES, MUTED, band_ticks, floats, log_steps, step_label
from crosscoder.report.table import FigureTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_K = (10, 50)
"""Sizes of the sets drawn against training steps."""
SETS = {"top": "top", "random": "matched random", "active": "random, as active"}


def _ability(figure: Figure, table: FigureTable) -> None:
    figure.set_size_inches(8.4, 3.4)
    left, right = figure.subplots(1, 2)
    steps = table.columns["step"]
    left.plot(steps, floats(table.columns["accuracy"]), color=COLOURS[0], marker="o", markersize=2.5)
    left.axhline(0.5, color=MUTED, linestyle=(0, (3, 2)), linewidth=0.8)
    left.set_ylim(0, 1.02)
    left.set_ylabel("accuracy")
    for index, name in enumerate(("clean", "corrupted")):
        values = floats(table.columns[name])
        right.plot(steps, values, color=COLOURS[index], linestyle=DASHES[index], marker="o", markersize=2.5, label=name)
    right.set_ylabel(table.extra["metric"])
    right.legend()
    for axes in (left, right):
        log_steps(axes, steps)


def _circuit(figure: Figure, table: FigureTable) -> None:
    features = table.extra["features"]
    n = len(features)
    figure.set_size_inches(5.4, 1.4 + 0.16 * n)
    axes = figure.subplots()
    share = floats(table.columns["share"]).reshape(n, -1)
    image = axes.imshow(np.ma.masked_invalid(share), aspect="auto", cmap="viridis", vmin=0)
    axes.grid(False)
    band_ticks(axes, [step_label(step) for step in table.columns["step"][: share.shape[1]]])
    axes.set_yticks(range(n), [str(feature) for feature in features], fontsize=7)
    axes.set_xlabel("snapshot (training step)")
    axes.set_ylabel("feature, in order of emergence")
    figure.colorbar(image, ax=axes, label="share of positive attribution", shrink=0.8)


def _dominance(figure: Figure, table: FigureTable) -> None:
    axes = figure.subplots()
    known = floats(table.columns["other features"])
    chosen = np.isfinite(known)
    steps = np.array(table.columns["step"], dtype=np.float64)[chosen]
    names = table.extra["series"]
    values = [floats(table.columns[name])[chosen] for name in names]
    if len(steps) > 1:
        axes.stackplot(steps, values, labels=names)
    else:
        below = np.zeros(len(steps))
        for name, value in zip(names, values, strict=True):
            axes.bar(steps, value, width=0.06 * (1 + steps), bottom=below, label=name)
            below = below + value
    log_steps(axes, table.columns["step"])
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of positive attribution")
    figure.legend(loc="outside right center", fontsize=7)


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


def _carriers(figure: Figure, table: FigureTable) -> None:
    axes = figure.subplots()
    features = table.columns["feature"][:20][::-1]
    axes.barh(range(len(features)), floats(table.columns["attribution"][:20])[::-1], color=COLOURS[0])
    axes.set_yticks(range(len(features)), [str(feature) for feature in features], fontsize=7)
    axes.set_xlabel("largest attribution over snapshots")
    axes.set_ylabel("feature")


DRAW_TASK: dict[str, Callable[[Figure, FigureTable], None]] = {
    "ability": _ability,
    "circuit": _circuit,
    "dominance": _dominance,
    "ablation": _ablation,
    "carriers": _carriers,
}
