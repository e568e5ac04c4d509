"""How many dimensions of the activations the features fill at each snapshot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from crosscoder.evolution.analyses.life import LIFE, SHOWN_KINDS
from crosscoder.evolution.dimensionality import Dimensionality, feature_dimensionality
from crosscoder.evolution.study import Analysis, Study
from crosscoder.evolution.summary import by_snapshot
from crosscoder.figures.results import Part, Results
from crosscoder.figures.spec import Axis, Lines, Panel, Series
from crosscoder.figures.table import FigureTable, plain_column


def compute(study: Study) -> Dimensionality:
    """Of all features, with each kind's part of the sum."""
    return feature_dimensionality(study.decoders, masks=study.result(LIFE).masks(), seed=study.settings.seed)


def summary(found: Dimensionality, revisions: Sequence[str]) -> dict[str, Any]:
    """The curve, and that of random directions."""
    return {
        "dimensionality_by_snapshot": by_snapshot(revisions, found.rate),
        "dimensionality_null_by_snapshot": by_snapshot(revisions, found.null_rate),
    }


def curves(found: Dimensionality, results: Results) -> FigureTable | None:
    """Of all features, each kind's part of it, and what random directions would have."""
    rates = {"all": found.rate, **{kind: found.rate_by_mask[kind] for kind in SHOWN_KINDS}}
    rates["random directions"] = found.null_rate
    series = [Series(name, name, colour=name) for name in rates]
    return FigureTable(
        "dimensionality",
        "Total feature dimensionality",
        "both",
        "Sum over features of |w|² / Σⱼ (ŵ·wⱼ)², divided by the width D: the share of the residual "
        "stream's dimensions that the decoders of a snapshot take up (the paper's). By kind (ours): the part of the "
        "sum that a kind's features have; the denominators run over all features.",
        results.by_snapshot | {name: plain_column(rate_K) for name, rate_K in rates.items()},
        Lines([Panel(Axis("share of D", "percent", domain=(0, 1)), series)]),
    )


def start_and_end(found: Dimensionality, results: Results) -> str:
    """Where the curve starts, is lowest and ends."""
    rate_K, null_K, steps_K = found.rate, found.null_rate, results.steps
    low = int(np.argmin(rate_K))
    return (
        f"Total feature dimensionality goes from {rate_K[0]:.0%} of the width at step {steps_K[0]:,} over a minimum of "
        f"{rate_K[low]:.0%} at step {steps_K[low]:,} to {rate_K[-1]:.0%}; random directions with the same norms would "
        f"take up {null_K[0]:.0%}, {null_K[low]:.0%} and {null_K[-1]:.0%}. Exact for this dictionary; how far other "
        "trainings differ is not known."
    )


SECTION = "Dimensionality"

DIMENSIONALITY = Analysis(
    "dimensionality",
    version=1,
    definition="feature dimensionality (the paper's), summed over features / D; by kind as parts of the whole, and "
    "expected of random directions with the same norms (ours)",
    result=Dimensionality,
    compute=compute,
    summary=summary,
    settings=("seed",),
    needs=(LIFE,),
    page=Part(Dimensionality, SECTION, (curves,), (start_and_end,)),
    required=True,
)
