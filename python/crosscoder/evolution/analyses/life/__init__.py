"""When features are there: kinds, births, deaths and lifetimes, with intervals, a null, and other thresholds."""

from __future__ import annotations

from crosscoder.evolution.analyses.examples import EXAMPLES
from crosscoder.evolution.analyses.life.compute import SHOWN_KINDS, LifeResult, compute, shown_kinds, summary
from crosscoder.evolution.analyses.life.figures import FIGURES
from crosscoder.evolution.analyses.life.words import NOTES, SENTENCES
from crosscoder.evolution.study import Analysis
from crosscoder.figures.results import Part

__all__ = ["LIFE", "SHOWN_KINDS", "LifeResult", "shown_kinds"]

LIFE = Analysis(
    "life",
    version=1,
    definition="decoder norms (the paper's); present where the norm is above tau times the feature's maximum, "
    "initialization iff present at step 0, emergence at the first of two snapshots in a row where it is present "
    "(ours); intervals by a bootstrap over features, null by shuffled snapshots (ours)",
    result=LifeResult,
    compute=compute,
    summary=summary,
    settings=("tau", "seed"),
    needs=(EXAMPLES,),
    page=Part(LifeResult, "Strength and life", FIGURES, SENTENCES, notes=NOTES),
    required=True,
)
