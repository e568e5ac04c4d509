"""How many dimensions of the activations the features fill at each snapshot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crosscoder.evolution.analyses.life import LIFE
from crosscoder.evolution.dimensionality import Dimensionality, feature_dimensionality
from crosscoder.evolution.study import Analysis, Study
from crosscoder.evolution.summary import by_snapshot


def compute(study: Study) -> Dimensionality:
    """Of all features, with each kind's part of the sum."""
    return feature_dimensionality(study.decoders, masks=study.result(LIFE).masks(), seed=study.settings.seed)


def summary(found: Dimensionality, revisions: Sequence[str]) -> dict[str, Any]:
    """The curve, and that of random directions."""
    return {
        "dimensionality_by_snapshot": by_snapshot(revisions, found.rate),
        "dimensionality_null_by_snapshot": by_snapshot(revisions, found.null_rate),
    }


DIMENSIONALITY = Analysis(
    "dimensionality",
    version=1,
    section="Dimensionality",
    definition="feature dimensionality (the paper's), summed over features / D; by kind as parts of the whole, and "
    "expected of random directions with the same norms (ours)",
    result=Dimensionality,
    compute=compute,
    summary=summary,
    settings=("seed",),
    needs=(LIFE,),
)
