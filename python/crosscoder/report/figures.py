"""The overview figures as SVG files, each with its numbers as CSV beside it: for papers and notes."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crosscoder.errors import MissingDependencyError
from crosscoder.files import write_bytes, write_text
from crosscoder.report.behaviour import kind_of
from crosscoder.report.behaviour_figures import DRAW_TASK
from crosscoder.report.data import PageData
from crosscoder.report.svg import COLOURS, DASHES, MUTED, band_ticks, floats, log_steps, step_label
from crosscoder.report.table import FigureTable
from crosscoder.report.tables import figure_tables
from crosscoder.report.validate import check

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KIND_COLOURS = {"initialization": "#0072b2", "emergent": "#bf4d0a", "dead": "#83868c", "other": "#00795f"}
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
    """Columns as CSV; None becomes an empty field."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return out.getvalue()


def _curves(names: Sequence[str], label: str, *, zero: bool = True) -> Callable[[Figure, FigureTable], None]:
    def draw(figure: Figure, table: FigureTable) -> None:
        axes = figure.subplots()
        present = [name for name in names if name in table.columns]
        for index, name in enumerate(present):
            axes.plot(
                table.columns["step"],
                floats(table.columns[name]),
                color=COLOURS[index],
                linestyle=DASHES[index],
                marker="o",
                markersize=2.5,
                label=name,
            )
        log_steps(axes, table.columns["step"])
        axes.set_ylabel(label)
        if zero:
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        if len(present) > 1:
            axes.legend()

    return draw


def _draw_loss(figure: Figure, table: FigureTable) -> None:
    axes = figure.subplots()
    axes.plot(
        table.columns["step"],
        floats(table.columns["loss"]),
        color=COLOURS[0],
        marker="o",
        markersize=2.5,
        label="model",
    )
    for index, (label, value) in enumerate(table.extra["entropies"].items()):
        axes.axhline(
            value,
            color=COLOURS[(index + 1) % len(COLOURS)],
            linestyle=(0, (3, 2)),
            linewidth=1,
            label=f"{label}  {value:.2f}",
        )
    log_steps(axes, table.columns["step"])
    axes.set_ylabel("nats a token")
    figure.legend(loc="outside lower center", ncols=2)


def _draw_norms(figure: Figure, table: FigureTable) -> None:
    kinds = list(table.extra["counts"])
    figure.set_size_inches(4.4 * len(kinds), 3.4)
    columns = {name: np.array(column, dtype=object) for name, column in table.columns.items()}
    panels = np.atleast_1d(figure.subplots(1, len(kinds), sharey=True))
    for axes, kind in zip(panels, kinds, strict=True):
        chosen = columns["kind"] == kind
        colour = _KIND_COLOURS.get(kind, COLOURS[3])
        for series in dict.fromkeys(columns["series"][chosen]):
            rows = chosen & (columns["series"] == series)
            is_mean = series == "mean"
            axes.plot(
                columns["step"][rows].astype(float), columns["norm"][rows].astype(float), color=colour,
                linewidth=2.6 if is_mean else 0.8, alpha=1.0 if is_mean else 0.5, zorder=3 if is_mean else 2,
            )  # fmt: skip
        if table.extra["threshold"] is not None:
            axes.axhline(table.extra["threshold"], color=MUTED, linestyle=(0, (3, 2)), linewidth=0.8)
        axes.set_title(f"{kind}: mean of {table.extra['counts'][kind]:,} (thick), examples (thin)", fontsize=9)
        log_steps(axes, [int(columns["step"].min()), int(columns["step"].max())])
    panels[0].set_ylabel("decoder norm / own maximum")


def _draw_stacked(position: str, label: str) -> Callable[[Figure, FigureTable], None]:
    def draw(figure: Figure, table: FigureTable) -> None:
        axes = figure.subplots()
        n = len(table.columns[position])
        below = np.zeros(n)
        for index, kind in enumerate(table.extra["kinds"]):
            heights = floats(table.columns[kind])
            axes.bar(
                range(n),
                heights,
                bottom=below,
                color=_KIND_COLOURS.get(kind, COLOURS[index % len(COLOURS)]),
                label=kind,
            )
            below += heights
        band_ticks(axes, [step_label(value) for value in table.columns[position]])
        axes.set_xlabel(label)
        axes.set_ylabel("features")
        axes.legend()

    return draw


def _draw_turnover(figure: Figure, table: FigureTable) -> None:
    axes = figure.subplots()
    places = range(len(table.columns["step"]))
    axes.bar(places, floats(table.columns["births"]), color=COLOURS[2], label="births")
    axes.bar(places, -floats(table.columns["deaths"]), color=COLOURS[3], label="deaths")
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
    band_ticks(axes, [step_label(step) for step in table.columns["step"]])
    axes.set_xlabel("snapshot (training step)")
    axes.set_ylabel("features")
    axes.legend()


def _draw_cosines(figure: Figure, table: FigureTable) -> None:
    figure.set_size_inches(4.8, 4.2)
    axes = figure.subplots()
    mean = floats(table.columns["mean"])
    n = round(len(mean) ** 0.5)
    steps = table.columns["other_step"][:n]
    image = axes.imshow(mean.reshape(n, n), origin="lower", vmin=0, vmax=1, cmap="viridis")
    axes.grid(False)
    labels = [step_label(step) for step in steps]
    band_ticks(axes, labels, most=9)
    axes.set_yticks(axes.get_xticks(), [label.get_text() for label in axes.get_xticklabels()])
    axes.set_xlabel("training step")
    axes.set_ylabel("training step")
    turning = table.extra["turning"]
    if turning is not None:
        for step, width in ((turning["step"], 1.2), (turning["low"], 0.6), (turning["high"], 0.6)):
            if step is not None:
                place = float(np.interp(np.log1p(step), np.log1p(steps), range(n)))
                axes.axvline(place, color="white", linestyle=(0, (3, 2)), linewidth=width)
                axes.axhline(place, color="white", linestyle=(0, (3, 2)), linewidth=width)
    figure.colorbar(image, ax=axes, label="mean cosine", shrink=0.8)


_DRAW: dict[str, Callable[[Figure, FigureTable], None]] = {
    "norms": _draw_norms,
    "emergence": _draw_stacked("step", "snapshot (training step)"),
    "lifetimes": _draw_stacked("snapshots", "snapshots present"),
    "turnover": _draw_turnover,
    "cosines": _draw_cosines,
    "dimensionality": _curves(["rate"], "total dimensionality / D"),
    "loss": _draw_loss,
    "kl": _curves(["unigram", "bigram", "per prediction"], "KL divergence, nats"),
    "induction": _curves(["gap"], "loss difference, nats"),
    "explained_variance": _curves(["mean of ratios", "ratio of sums"], "explained variance", zero=False),
    "l0": _curves(["l0"], "active features a token"),
}


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
    written = []
    draw = {**_DRAW, **DRAW_TASK}
    for table in figure_tables(data):
        path = folder / f"{table.key}.svg"
        write_bytes(path, draw_svg(table.title, draw[kind_of(table.key)], table))
        write_text(folder / f"{table.key}.csv", csv_text(table.columns))
        written.append(path)
    return written
