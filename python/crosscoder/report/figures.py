"""The overview figures as SVG files, each with its numbers as CSV beside it: for papers and notes."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from crosscoder.errors import MissingDependencyError
from crosscoder.files import write_bytes, write_text
from crosscoder.report.behaviour import kind_of
from crosscoder.report.behaviour_figures import DRAW_OWN
from crosscoder.report.data import PageData
from crosscoder.report.draw import draw
from crosscoder.report.svg import MUTED
from crosscoder.report.tables import figure_tables
from crosscoder.report.validate import check

_INK, _GRID = "#1b1d22", "#e4e2dc"
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "figure.figsize": (5.4, 3.4),
    "figure.constrained_layout.use": True,
    "svg.fonttype": "path",
    "svg.hashsalt": "crosscoder",
}


def csv_text(columns: Mapping[str, Sequence[Any]]) -> str:
    """Columns as CSV; None becomes an empty field. Text that a spreadsheet would run as a formula gets a ' in front."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_cell, columns))
    writer.writerows(map(_cell, row) for row in zip(*columns.values(), strict=True))
    return out.getvalue()


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def draw_svg(title: str, draw: Callable[..., None], *arguments: Any) -> bytes:
    """What `draw(figure, *arguments)` draws, in the common style, as SVG: the same bytes for the same numbers.

    Raises `MissingDependencyError` without matplotlib.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("figures need matplotlib: pip install matplotlib") from error
    # the object interface: no global backend or state is touched
    with rc_context(_STYLE):
        figure = Figure()
        FigureCanvasSVG(figure)
        draw(figure, *arguments)
        figure.suptitle(title, fontsize=10.5, fontweight="bold")
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def save_figures(data: PageData, folder: Path) -> list[Path]:
    """Write `KEY.svg` and `KEY.csv` for each figure that `data` has numbers for; returns the SVG files.

    Raises `DataError` where `data` does not fit together, `MissingDependencyError` without matplotlib,
    `StorageError` where the folder cannot be written.
    """
    check(data)
    marks = [{"step": mark.step, "label": mark.label} for mark in data.marks]
    written = []
    for table in figure_tables(data):
        path = folder / f"{table.key}.svg"
        if table.spec is None:
            image = draw_svg(table.title, DRAW_OWN[kind_of(table.key)], table)
        else:
            image = draw_svg(table.title, draw, table, marks)
        write_bytes(path, image)
        write_text(folder / f"{table.key}.csv", csv_text(table.columns))
        written.append(path)
    return written
