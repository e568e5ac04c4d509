"""The general kinds of figures (`spec.py`) with matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from crosscoder.common.svg import (
    COLOURS,
    DASHES,
    GREY,
    INK,
    MUTED,
    band_ticks,
    bend,
    floats,
    log_steps,
    step_label,
    unbend,
)
from crosscoder.figures.spec import STEP, Axis, Bars, Format, Heat, Lines, Listing, Measure, Panel, Scatter, Series
from crosscoder.figures.table import FigureTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis as DrawnAxis
    from matplotlib.figure import Figure

KIND_COLOURS = {"initialization": COLOURS[0], "emergent": COLOURS[1], "dead": GREY, "other": COLOURS[2], "all": INK}
HEATS_ACROSS = 3
"""Heat maps side by side in one figure."""
MARKERS = "os^Dv<>pPX"
"""Of the lines of one series: which of them is which."""
LISTED = 20
"""Rows of a listing that its bars show."""
Mark = Mapping[str, Any]
"""A training step with "step", "label" and perhaps "low" and "high"."""


def draw(figure: Figure, table: FigureTable, marks: Sequence[Mark] = ()) -> None:
    """Draw `table`, which has a spec, on an empty figure, with the page's marks of training steps."""
    assert table.spec is not None
    _DRAW[type(table.spec)](figure, table, table.spec, [*marks, *table.extra.get("marks", [])])


def _colour(series: Series, index: int, n: int) -> str:
    if series.colour in KIND_COLOURS:
        return KIND_COLOURS[series.colour]
    if n <= len(COLOURS):
        return COLOURS[index % len(COLOURS)]
    return MUTED if index == n - 1 else f"C{index % 10}"


def _arrays(table: FigureTable) -> dict[str, np.ndarray]:
    return {name: np.array(column, dtype=object) for name, column in table.columns.items()}


def _format(axis: DrawnAxis, way: Format) -> None:
    if way == "percent":
        axis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    elif way == "count":
        axis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")


def _round_ticks(axis: DrawnAxis) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_minor_formatter(NullFormatter())


def _set_y(axes: Axes, axis: Axis) -> None:
    axes.set_ylabel(axis.label)
    if axis.scale == "log":
        axes.set_yscale("log")
        _round_ticks(axes.yaxis)
    else:
        _format(axes.yaxis, axis.format)
    if axis.zero:
        axes.set_ylim(min(0, axes.get_ylim()[0]), max(0, axes.get_ylim()[1]))
    low, high = axis.domain
    axes.set_ylim(low, None if high is None else high + 0.02 * (high - (low or 0)))


def _set_x(axes: Axes, axis: Axis | None, table: FigureTable, marks: Sequence[Mark]) -> None:
    if axis is None:
        steps = [step for step in table.columns[STEP] if step is not None]
        log_steps(axes, sorted(set(steps)))
        for mark in marks:
            _mark(axes, mark, mark["step"], mark.get("low"), mark.get("high"))
        return
    axes.set_xlabel(axis.label)
    if axis.scale == "log":
        axes.set_xscale("log")
        _round_ticks(axes.xaxis)
    else:
        _format(axes.xaxis, axis.format)
    axes.set_xlim(*axis.domain)


def _mark(axes: Axes, mark: Mark, at: float, low: float | None, high: float | None) -> None:
    if low is not None and high is not None and np.isfinite([low, high]).all():
        axes.axvspan(low, high, color=MUTED, alpha=0.15, linewidth=0)
    axes.axvline(at, color=MUTED, linestyle=(0, (1, 2)), linewidth=0.9)
    axes.text(
        at, 1, f"{mark['label']} ", rotation=90, ha="right", va="top", fontsize=6, color=MUTED,
        transform=axes.get_xaxis_transform(),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ lines


def _lines(figure: Figure, table: FigureTable, spec: Lines, marks: Sequence[Mark]) -> None:
    n = len(spec.panels)
    figure.set_size_inches(4.4 * n if n > 1 else 5.4, 3.4)
    rows = _arrays(table)
    for axes, panel in zip(figure.subplots(1, n, squeeze=False)[0], spec.panels, strict=True):
        _panel(axes, table, spec, panel, rows)
        _set_x(axes, None if spec.x == STEP else spec.x_axis, table, marks)
        _set_y(axes, panel.y)
        if panel.title:
            axes.set_title(panel.title, fontsize=9)
        labels = axes.get_legend_handles_labels()[1]
        if labels and max(len(labels), len(panel.series) + len(panel.rules or {})) > 1:
            axes.legend()


def _panel(axes: Axes, table: FigureTable, spec: Lines, panel: Panel, rows: Mapping[str, np.ndarray]) -> None:
    chosen = np.ones(len(rows[spec.x]), dtype=bool)
    for column, value in (panel.where or {}).items():
        chosen &= rows[column] == value
    groups = {"": chosen} if spec.split is None else {
        name: chosen & (rows[spec.split] == name) for name in dict.fromkeys(rows[spec.split][chosen])
    }  # fmt: skip
    marker = _markers(panel, groups, rows)
    for index, series in enumerate(panel.series):
        colour = _colour(series, index, len(panel.series))
        for name, group in groups.items():
            thin = "feature" in rows and rows["feature"][group][0] is not None
            x, y = floats(rows[spec.x][group]), floats(rows[series.column][group])
            style: dict[str, Any] = {"linestyle": DASHES[index % len(DASHES)], "linewidth": 1.8, "zorder": 3}
            if thin:
                style = {"linewidth": 0.8, "alpha": 0.5, "zorder": 2}
            elif "feature" not in rows:
                style |= {"marker": marker.get(name, "o"), "markersize": 4 if marker else 2.5}
            named = not thin and np.isfinite(y).any() and series.label not in axes.get_legend_handles_labels()[1]
            axes.plot(x, y, color=colour, label=series.label if named and not marker else None, **style)
            if named and marker:  # which marker is which has entries of its own
                axes.plot([], [], color=colour, label=series.label, **{**style, "marker": ""})
            if series.low and series.high and not thin:
                low, high = (floats(rows[end][group]) for end in (series.low, series.high))
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    for name, shape in marker.items():
        axes.plot([], [], color=MUTED, linestyle="", marker=shape, markersize=4, label=name)
    for index, (label, value) in enumerate((panel.rules or {}).items(), len(panel.series)):
        colour = COLOURS[index % len(COLOURS)] if len(panel.rules or {}) > 1 else MUTED
        axes.axhline(value, color=colour, linestyle=(0, (3, 2)), linewidth=0.9, label=f"{label}  {value:.3g}")


def _markers(panel: Panel, groups: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]) -> dict[str, str]:
    """A marker for each group of rows, where some series has lines of several and they are not features'."""
    drawn = {
        series.column: [name for name, group in groups.items() if np.isfinite(floats(rows[series.column][group])).any()]
        for series in panel.series
    }
    if "feature" in rows or max(map(len, drawn.values()), default=0) < 2:
        return {}
    named = [name for name in groups if any(name in names for names in drawn.values())]
    return {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(named)}


# ------------------------------------------------------------------------------------------------- bars


def _bars(figure: Figure, table: FigureTable, spec: Bars, marks: Sequence[Mark]) -> None:
    axes = figure.subplots()
    by_step = spec.x == "snapshot"
    names = table.columns[STEP if by_step else spec.x]
    places = range(len(names))
    below = np.zeros(len(names))
    for index, series in enumerate(spec.series):
        heights = np.nan_to_num(floats(table.columns[series.column]))
        down = series.column in spec.down
        axes.bar(
            places,
            -heights if down else heights,
            bottom=None if down else below,
            color=_colour(series, index, len(spec.series)),
            label=series.label,
        )
        below += 0 if down else heights
    if spec.down:
        axes.axhline(0, color=MUTED, linewidth=0.8)
    band_ticks(axes, [step_label(name) if isinstance(name, (int, float)) else str(name) for name in names])
    if any(isinstance(name, str) for name in names):
        axes.tick_params(axis="x", labelrotation=30)
    if by_step and len(names) > 1:
        for mark in marks:
            low, high = (None if mark.get(end) is None else _between(names, mark[end]) for end in ("low", "high"))
            _mark(axes, mark, _between(names, mark["step"]), low, high)
    axes.set_xlabel(spec.x_label)
    _set_y(axes, spec.y)
    if len(spec.series) > 5:
        figure.legend(loc="outside right center", fontsize=7)
    elif len(spec.series) > 1:
        axes.legend()


def _between(steps: Sequence[float], step: float) -> float:
    """Where a step lies on an axis of equally wide snapshots, by log(1 + step) between two."""
    return float(np.interp(bend(step), bend(steps), range(len(steps))))


# ---------------------------------------------------------------------------------------------- scatter


def _scatter(figure: Figure, table: FigureTable, spec: Scatter, marks: Sequence[Mark]) -> None:
    axes = figure.subplots()
    x, y = floats(table.columns[spec.x]), floats(table.columns[spec.y])
    if spec.jitter:
        rng = np.random.default_rng(0)
        spread = 0.25 * rng.uniform(-1, 1, (2, len(x)))
        x = unbend(bend(x) + 0.4 * spread[0]) if spec.x == STEP else x + spread[0]
        if np.all(y[np.isfinite(y)] % 1 == 0):
            y = y * np.exp(spread[1]) if spec.y_axis.scale == "log" else y + spread[1]
    group = np.array(table.columns[spec.group], dtype=object) if spec.group else np.full(len(x), "", dtype=object)
    for index, name in enumerate(spec.groups or [""]):
        of_group = group == name
        colour = _colour(Series("", name, colour=name), index, len(spec.groups))
        axes.scatter(
            x[of_group], y[of_group], s=7, color=colour, alpha=0.5, linewidths=0, label=f"{name} ({of_group.sum():,})"
        )
    _set_x(axes, None if spec.x == STEP else spec.x_axis, table, marks)
    _set_y(axes, spec.y_axis)
    if len(spec.groups) > 1:
        axes.legend(markerscale=2)


# ------------------------------------------------------------------------------------------------- heat


def _heat(figure: Figure, table: FigureTable, spec: Heat, marks: Sequence[Mark]) -> None:
    """A panel for each measure, which the page shows one at a time."""
    n, up = len(spec.measures), len(set(table.columns[spec.y]))
    columns = min(n, HEATS_ACROSS)
    rows = -(-n // columns)
    width, height = (4.8, 4.2) if spec.square else (5.4, 1.4 + 0.16 * up)
    figure.set_size_inches(columns * width, rows * height)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, measure in zip(grid, spec.measures, strict=False):
        _heat_panel(figure, axes, table, spec, measure)
    for axes in grid[n:]:
        axes.remove()


def _heat_panel(figure: Figure, axes: Axes, table: FigureTable, spec: Heat, measure: Measure) -> None:
    across, up = (list(dict.fromkeys(table.columns[name])) for name in (spec.x, spec.y))
    values = floats(table.columns[measure.column]).reshape(len(up), len(across))
    low, high = measure.domain
    if measure.signed:
        high = float(np.nanmax(np.abs(values), initial=1e-12))
        low = -high
    image = axes.imshow(
        np.ma.masked_invalid(values),
        aspect="equal" if spec.square else "auto",
        origin="lower" if spec.square else "upper",
        cmap="RdBu" if measure.signed else "viridis",
        vmin=low,
        vmax=high,
    )
    axes.grid(False)
    if spec.square:
        steps = table.columns["other_step"][: len(across)]
        band_ticks(axes, [step_label(step) for step in steps], most=9)
        axes.set_yticks(axes.get_xticks(), [label.get_text() for label in axes.get_xticklabels()])
        for step, width in _turning(table):
            place = _between(steps, step)
            axes.axvline(place, color="white", linestyle=(0, (3, 2)), linewidth=width)
            axes.axhline(place, color="white", linestyle=(0, (3, 2)), linewidth=width)
    else:
        names = table.columns[STEP][: len(across)] if spec.x == "snapshot" else across
        band_ticks(axes, [step_label(name) if isinstance(name, (int, float)) else str(name) for name in names])
        axes.set_yticks(range(len(up)), [str(name) for name in up], fontsize=7)
    axes.set_xlabel(spec.x_label)
    axes.set_ylabel(spec.y_label)
    figure.colorbar(image, ax=axes, label=measure.label, shrink=0.8)


def _turning(table: FigureTable) -> list[tuple[float, float]]:
    """Steps of the turning point and its interval, with the widths of their lines."""
    turning = table.extra.get("turning")
    if turning is None:
        return []
    lines = ((turning["step"], 1.2), (turning["low"], 0.6), (turning["high"], 0.6))
    return [(step, width) for step, width in lines if step is not None]


# ---------------------------------------------------------------------------------------------- listing


def _listing(figure: Figure, table: FigureTable, spec: Listing, marks: Sequence[Mark]) -> None:
    axes = figure.subplots()
    name = spec.fields[0]
    rows = [str(value) for value in table.columns[name.column][:LISTED]][::-1]
    axes.barh(range(len(rows)), floats(table.columns[spec.bar][:LISTED])[::-1], color=COLOURS[0])
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_xlabel(next(field.label for field in spec.fields if field.column == spec.bar))
    axes.set_ylabel(name.label)


_DRAW: dict[type, Callable[[Figure, FigureTable, Any, Sequence[Mark]], None]] = {
    Lines: _lines,
    Bars: _bars,
    Scatter: _scatter,
    Heat: _heat,
    Listing: _listing,
}
