"""How many dimensions the features of each kind would fill by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crosscoder.evolution.analyses.dimensionality import SECTION
from crosscoder.evolution.analyses.life import LIFE, shown_kinds
from crosscoder.evolution.dimensionality import KindDimensionality, kind_dimensionality
from crosscoder.evolution.strength import KIND_NAMES
from crosscoder.evolution.study import Analysis, Study
from crosscoder.evolution.summary import by_snapshot
from crosscoder.figures.results import Part, Results
from crosscoder.figures.spec import Axis, Lines, Panel, Series
from crosscoder.figures.table import FigureTable, plain_column


def compute(study: Study) -> KindDimensionality:
    """Of each kind's features alone."""
    return kind_dimensionality(study.decoders, study.result(LIFE).masks(), seed=study.settings.seed)


def summary(found: KindDimensionality, revisions: Sequence[str]) -> dict[str, Any]:
    """A curve for each kind."""
    curves = {name: by_snapshot(revisions, found.rate_within[name]) for name in KIND_NAMES}
    return {"kind_dimensionality_by_snapshot": curves}


def curves(found: KindDimensionality, results: Results) -> FigureTable | None:
    """Each kind's features as if there were no others, beside random directions."""
    kinds = shown_kinds(results)
    if not kinds:
        return None
    columns, panels = results.by_snapshot, []
    for kind in kinds:
        columns[kind] = plain_column(found.rate_within[kind])
        columns[f"{kind}, null"] = plain_column(found.null_within[kind])
        series = [Series(kind, kind, colour=kind), Series(f"{kind}, null", "random directions", colour="all")]
        panels.append(Panel(Axis("share of D", "percent", domain=(0, 1)), series, kind))
    return FigureTable(
        "kind_dimensionality",
        "Dimensionality of each kind by itself",
        "ours",
        "The same sum over one kind's features, the denominators over this kind's features too: how many dimensions it "
        "would fill if there were no other. Dashed: what random directions with the same norms would take up; under "
        "it, features share directions more than chance has it.",
        columns,
        Lines(panels),
        wide=True,
    )


def at_the_end(found: KindDimensionality, results: Results) -> str:
    """What each kind fills at the last snapshot, beside random directions."""
    parts = list[str]()
    for kind in shown_kinds(results):
        own, null = found.rate_within[kind][-1], found.null_within[kind][-1]
        parts.append(
            f"the {kind} features {own:.0%} ({null:.0%})" if parts else
            f"the {kind} features would fill {own:.0%} of the width at the last snapshot (random directions: "
            f"{null:.0%})"
        )  # fmt: skip
    return f"By themselves {', '.join(parts)}." if parts else ""


KIND_DIMENSIONALITY = Analysis(
    "kind_dimensionality",
    version=1,
    definition="feature dimensionality of each kind's features as if there were no others, and expected of random "
    "directions with the same norms (ours)",
    result=KindDimensionality,
    compute=compute,
    summary=summary,
    settings=("seed",),
    needs=(LIFE,),
    page=Part(KindDimensionality, SECTION, (curves,), (at_the_end,)),
)
