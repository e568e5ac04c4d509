"""Whether a decoder norm says how separable a feature is in a snapshot's activations."""

from __future__ import annotations

from crosscoder.evolution.analyses.examples import EXAMPLES
from crosscoder.evolution.analyses.life import LIFE
from crosscoder.evolution.analyses.probes.compute import ProbesResult, compute, summary
from crosscoder.evolution.analyses.probes.figures import disagreements, follows, separability, separability_by_norm
from crosscoder.evolution.study import Analysis
from crosscoder.figures.results import Part

__all__ = ["PROBES", "ProbesResult"]

SECTION = "Honesty of the norm"

PROBES = Analysis(
    "probes",
    version=1,
    definition="AUC of a linear probe (Fisher's discriminant) of each snapshot's activations for \"the feature is "
    'active" on held-out tokens, against the relative norm (ours); features sampled by kind and emergence, each with '
    "the number it stands for",
    result=ProbesResult,
    compute=compute,
    summary=summary,
    settings=("n_probed", "seed"),
    needs=(EXAMPLES, LIFE),
    page=Part(ProbesResult, SECTION, (separability, separability_by_norm, disagreements), (follows,)),
)
