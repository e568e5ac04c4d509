"""The overview figures as SVG files, each with its numbers as CSV beside it: for papers and notes."""

from __future__ import annotations

from pathlib import Path

from crosscoder.common.svg import draw_svg
from crosscoder.common.tables import csv_text
from crosscoder.files import write_bytes, write_text
from crosscoder.report.data import PageData
from crosscoder.report.draw import draw
from crosscoder.report.draw_ablation import DRAW_OWN
from crosscoder.report.validate import check


def save_figures(data: PageData, folder: Path) -> list[Path]:
    """Write `KEY.svg` and `KEY.csv` for each figure that `data` has numbers for; returns the SVG files.

    Raises `DataError` where `data` does not fit together, `MissingDependencyError` without matplotlib,
    `StorageError` where the folder cannot be written.
    """
    check(data)
    marks = [{"step": mark.step, "label": mark.label} for mark in data.marks]
    written = []
    for table in data.tables:
        path = folder / f"{table.key}.svg"
        if table.spec is None:
            image = draw_svg(table.title, DRAW_OWN[table.key.split("--")[0]], table)
        else:
            image = draw_svg(table.title, draw, table, marks)
        write_bytes(path, image)
        write_text(folder / f"{table.key}.csv", csv_text(table.columns))
        written.append(path)
    return written
