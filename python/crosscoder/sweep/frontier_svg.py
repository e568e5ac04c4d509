"""The frontiers side by side: explained variance against L0, at the last snapshot and over all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crosscoder.common.svg import COLOURS, MUTED
from crosscoder.sweep.frontier import Frontier
from crosscoder.sweep.points import LABELS, METHODS
from crosscoder.sweep.result_tables import SCOPES, Columns, points_of_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {"last": "last snapshot", "all": "all snapshots"}
_MARKERS = ("o", "s", "^", "D", "v")
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1, 1, 1)), (0, (2, 2)))


def draw_frontier(figure: Figure, table: Columns) -> None:
    """`table` is that of `tables.results`: a line a method, F and seed; a colour a method, a marker and dash an F.

    The line goes through the points that none of the same method, F and seed dominates; the others are pale.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure.set_size_inches(8.8, 4.0)
    sizes = sorted(set(table["n_features"]))
    panels = figure.subplots(1, len(SCOPES))
    for axes, scope in zip(panels, SCOPES, strict=True):
        labels: dict[str, str] = {**LABELS}  # each once
        lines = points_of_lines(table, scope)
        for method, F, seed in sorted(lines, key=lambda line: (METHODS.index(line[0]), *line[1:])):
            points = [point for point in lines[method, F, seed] if point[0]]
            if not points:
                continue
            frontier, place = Frontier.of(*zip(*points, strict=True)), sizes.index(F)
            colour, marker = COLOURS[METHODS.index(method)], _MARKERS[place % len(_MARKERS)]
            axes.scatter(*zip(*points, strict=True), color=colour, marker=marker, s=10, alpha=0.3, linewidths=0)
            axes.plot(
                frontier.l0_P,
                frontier.explained_P,
                color=colour,
                marker=marker,
                linestyle=_DASHES[place % len(_DASHES)],
                markersize=4,
                linewidth=1.2,
                label=labels.pop(method, None),
            )
        if scope == "last" and len(sizes) > 1:
            for place, F in enumerate(sizes):
                style = {"marker": _MARKERS[place % len(_MARKERS)], "linestyle": _DASHES[place % len(_DASHES)]}
                axes.plot([], [], color=MUTED, markersize=4, linewidth=1.2, label=f"F = {F:,}", **style)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(_TITLES[scope], fontsize=9)
        axes.set_xlabel("L0: active features a token and snapshot")
        axes.set_ylabel("explained variance")
        if axes.lines:
            axes.legend(loc="best")
