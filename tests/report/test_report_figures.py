"""SVG and CSV files of the figures."""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import page_synthetic

from crosscoder.figures.spec import Axis, Lines, Panel, Series
from crosscoder.figures.table import FigureTable, plain_column
from crosscoder.report.data import PageData
from crosscoder.report.figures import save_figures


def test_every_figure_is_an_svg_with_its_numbers_beside_it(tmp_path: Path) -> None:
    data = page_synthetic.page_data(200, per_feature=0)
    written = save_figures(data, tmp_path)
    assert [path.stem for path in written] == list(page_synthetic.FIGURE_KEYS)
    for path in written:
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 20
    with (tmp_path / "l0.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(data.steps)
    np.testing.assert_allclose(
        [float(row["l0"]) for row in rows], next(one for one in data.tables if one.key == "l0").columns["l0"]
    )


def lines(steps: list[int], values: list[float]) -> PageData:
    columns = {"snapshot": list(range(len(steps))), "step": plain_column(steps), "l0": plain_column(values)}
    spec = Lines([Panel(Axis("active features a token"), [Series("l0", "l0")])])
    return PageData("t", [], steps, tables=[FigureTable("l0", "L0", "paper", "How many.", columns, spec)])


def test_missing_values_are_empty_fields_and_files_are_reproducible(tmp_path: Path) -> None:
    data = lines([0, 10, 20], [1.0, np.nan, 3.0])
    save_figures(data, tmp_path / "a")
    save_figures(data, tmp_path / "b")
    assert (tmp_path / "a" / "l0.csv").read_text() == "snapshot,step,l0\n0,0,1.0\n1,10,\n2,20,3.0\n"
    assert (tmp_path / "a" / "l0.svg").read_bytes() == (tmp_path / "b" / "l0.svg").read_bytes()


def test_one_snapshot_is_enough(tmp_path: Path) -> None:
    assert [path.name for path in save_figures(lines([1000], [2.0]), tmp_path)] == ["l0.svg"]
