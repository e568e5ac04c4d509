"""How many dimensions the features of each kind would fill by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crosscoder.evolution.analyses.life import LIFE
from crosscoder.evolution.dimensionality import KindDimensionality, kind_dimensionality
from crosscoder.evolution.strength import KIND_NAMES
from crosscoder.evolution.study import Analysis, Study
from crosscoder.evolution.summary import by_snapshot


def compute(study: Study) -> KindDimensionality:
    """Of each kind's features alone."""
    return kind_dimensionality(study.decoders, study.result(LIFE).masks(), seed=study.settings.seed)


def summary(found: KindDimensionality, revisions: Sequence[str]) -> dict[str, Any]:
    """A curve for each kind."""
    curves = {name: by_snapshot(revisions, found.rate_within[name]) for name in KIND_NAMES}
    return {"kind_dimensionality_by_snapshot": curves}


KIND_DIMENSIONALITY = Analysis(
    "kind_dimensionality",
    version=1,
    section="Dimensionality",
    definition="feature dimensionality of each kind's features as if there were no others, and expected of random "
    "directions with the same norms (ours)",
    result=KindDimensionality,
    compute=compute,
    summary=summary,
    settings=("seed",),
    needs=(LIFE,),
)
