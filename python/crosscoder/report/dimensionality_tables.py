"""The figure of the dimensions that each kind of features would fill by itself, from results."""

from __future__ import annotations

from crosscoder.figures.spec import Axis, Lines, Panel, Series
from crosscoder.figures.table import FigureTable, plain_column
from crosscoder.report.results import Results
from crosscoder.report.sections import DIMENSIONALITY


def within_kinds(results: Results) -> FigureTable | None:
    """Dimensionality of each kind's features as if there were no others, beside random directions."""
    columns = results.by_snapshot
    panels = []
    for kind in results.kinds:
        found = results.get("kind_dimensionality", f"rate_within.{kind}", f"null_within.{kind}")
        if found is not None:
            columns[kind], columns[f"{kind}, null"] = (plain_column(rate_K) for rate_K in found)
            series = [Series(kind, kind, colour=kind), Series(f"{kind}, null", "random directions", colour="all")]
            panels.append(Panel(Axis("share of D", "percent", domain=(0, 1)), series, kind))
    if not panels:
        return None
    return FigureTable(
        "kind_dimensionality",
        DIMENSIONALITY,
        "Dimensionality of each kind by itself",
        "ours",
        "The same sum over one kind's features, the denominators over this kind's features too: how many dimensions it "
        "would fill if there were no other. Dashed: what random directions with the same norms would take up; under "
        "it, features share directions more than chance has it.",
        columns,
        Lines(panels),
        wide=True,
    )
