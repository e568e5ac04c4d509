"""How a figure's columns are drawn: a few general kinds, each described by plain values.

The page draws a spec with `report/assets/kinds.js`, the SVG files with `report/draw.py`: a new figure needs neither new
JavaScript nor new matplotlib code. Columns are named; rows with None are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Format = Literal["number", "count", "percent", "text"]
"""How values are written: 0.123, 1,234, 12 %, as they are."""
STEP = "step"
"""The column of training steps: on it the page's log or linear axis is drawn."""
SNAPSHOTS = "snapshot (training step)"
"""Label of an axis of snapshots."""


@dataclass(frozen=True)
class Axis:
    """An axis: what it shows, and how."""

    label: str
    format: Format = "number"
    scale: Literal["linear", "log"] = "linear"
    domain: tuple[float | None, float | None] = (None, None)
    """Ends that are fixed; None is found from the data."""
    zero: bool = False
    """Whether 0 is on the axis and marked."""


@dataclass(frozen=True)
class Series:
    """A column of values, perhaps with columns of an interval around it."""

    column: str
    label: str
    low: str | None = None
    high: str | None = None
    colour: str | None = None
    """The name of a feature kind, or "all" of them, which have their own colours; else colours are given in order."""


@dataclass(frozen=True)
class Panel:
    """One drawing of a figure of lines."""

    y: Axis
    series: Sequence[Series]
    title: str = ""
    where: Mapping[str, Any] | None = None
    """Only the rows with these values in these columns."""
    rules: Mapping[str, float] | None = None
    """Horizontal lines: label -> value."""


@dataclass(frozen=True)
class Lines:
    """Lines with bands, against training steps or any number."""

    panels: Sequence[Panel]
    x: str = STEP
    x_axis: Axis | None = None
    """Needed unless `x` is `STEP`."""
    split: str | None = None
    """A column: rows of one value make one line, drawn thin where the column `feature` names a feature."""
    kind: str = "lines"


@dataclass(frozen=True)
class Bars:
    """Bars side by side on a band of categories; those of a category are stacked."""

    x: str
    """"snapshot" shows its steps; any other column shows its values."""
    x_label: str
    y: Axis
    series: Sequence[Series]
    down: Sequence[str] = ()
    """Columns drawn downwards."""
    lists: bool = False
    """Whether a click on a snapshot lists the features that emerge there."""
    kind: str = "bars"


@dataclass(frozen=True)
class Scatter:
    """A point a feature; `groups` colour by the values of `group`."""

    x: str
    x_axis: Axis | None
    """None where `x` is `STEP`."""
    y: str
    y_axis: Axis
    group: str | None = None
    groups: Sequence[str] = ()
    details: Sequence[str] = ()
    """Columns that the tooltip shows too."""
    jitter: bool = False
    """Spread points of equal x or y, which would hide each other: a drawing's matter, the columns are exact."""
    kind: str = "scatter"


@dataclass(frozen=True)
class Measure:
    """One way to colour a heat map."""

    column: str
    label: str
    domain: tuple[float | None, float | None] = (None, None)
    signed: bool = False
    """A diverging ramp around 0."""


@dataclass(frozen=True)
class Heat:
    """Coloured cells; several measures make a choice above it."""

    x: str
    """"snapshot" or "other_snapshot" shows steps."""
    y: str
    x_label: str
    y_label: str
    measures: Sequence[Measure]
    details: Sequence[str] = ()
    square: bool = False
    kind: str = "heat"


@dataclass(frozen=True)
class Field:
    """One column of a listing."""

    column: str
    label: str
    format: Format = "number"
    prefix: str = ""
    narrow: bool = True
    """Whether it stays in a narrow window."""


@dataclass(frozen=True)
class Listing:
    """Rows of text. A column `feature` leads to the feature; `before`, `token`, `after` are shown as a context."""

    fields: Sequence[Field]
    bar: str
    """The column that the SVG file shows as bars."""
    context: str = ""
    """Heading of the context; empty where there is none."""
    text: str = ""
    """A column of prose that takes the rest of the row; empty where there is none."""
    kind: str = "listing"


Spec = Lines | Bars | Scatter | Heat | Listing


def plain(spec: Spec) -> dict[str, Any]:
    """The spec as the page reads it."""
    return asdict(spec)
