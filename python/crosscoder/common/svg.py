"""What the SVG figures share: the style, colours, columns as arrays, step axes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from crosscoder.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The colours of the page's light theme (report/assets/base.css); a test holds the two together.
COLOURS = ("#0072b2", "#bf4d0a", "#00795f", "#a8457f", "#8a6a00")
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)))
MUTED = "#5b5f68"
INK, GREY, _GRID = "#1b1d22", "#83868c", "#e4e2dc"
bend, unbend = np.log1p, np.expm1
"""Where a step stands on an axis of log(1 + step), on which step 0 has its place, and back."""
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
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


def floats(column: Sequence[Any] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.array([np.nan if value is None else value for value in column], dtype=np.float64)


def step_label(step: float) -> str:
    return f"{step / 1000:g}k" if step >= 1000 else f"{step:g}"


def log_steps(axes: Axes, steps: Sequence[int]) -> None:
    """A log(1 + step) axis: step 0 has its place, and the axis is that of the page."""
    # matplotlib tries limits below step -1 while it lays out: keep those finite
    axes.set_xscale("function", functions=(lambda x: bend(np.maximum(x, -0.99)), unbend))
    first, last = bend(steps[0]), bend(steps[-1])
    margin = 0.03 * max(last - first, 1.0)
    axes.set_xlim(unbend(first - margin), unbend(last + margin))
    ticks = [tick for tick in (0, 1, 10, 100, 1_000, 10_000, 100_000, 1_000_000) if steps[0] <= tick <= steps[-1]]
    ticks = ticks if len(ticks) > 1 else [steps[0], steps[-1]]
    axes.set_xticks(ticks, [step_label(tick) for tick in ticks])
    axes.set_xlabel("training step")


def band_ticks(axes: Axes, labels: Sequence[str], most: int = 12) -> None:
    shown = range(0, len(labels), -(-len(labels) // most))
    axes.set_xticks(list(shown), [labels[index] for index in shown])
