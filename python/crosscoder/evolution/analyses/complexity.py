"""How complex features are by the text alone, and whether complex ones emerge later."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscoder.common.statistics import Correlation
from crosscoder.evolution.analyses.life import LIFE
from crosscoder.evolution.analyses.positions import POSITIONS
from crosscoder.evolution.complexity import (
    ContextNeeded,
    TokenEntropy,
    choose_features,
    context_needed,
    correlations,
    token_entropy,
)
from crosscoder.evolution.reading import snapshot_reader
from crosscoder.evolution.study import Analysis, Study
from crosscoder.evolution.summary import finite
from crosscoder.evolution.types import MIN_EXAMPLES


@dataclass(frozen=True)
class ComplexityResult:
    """Measures of complexity, and their correlations with emergence over all and over the emergent features.

    Keys of the correlations: "entropy", "entropy_before", "context" (its logarithm).
    """

    entropy: TokenEntropy
    context: ContextNeeded
    all: dict[str, Correlation]
    emergent: dict[str, Correlation]


def compute(study: Study) -> ComplexityResult:
    """Entropies of all features, the context needed by some."""
    seed, places = study.settings.seed, study.result(POSITIONS)
    emergence = study.result(LIFE).emergence_by_part()
    entropy = token_entropy(places, study.train)
    eligible_F = places.fired >= MIN_EXAMPLES
    features = choose_features(emergence["all"], eligible_F, study.settings.complexity_features, seed=seed)
    read = snapshot_reader(study.snapshots, study.folded, title="complexity")
    context = context_needed(read, study.train, places.strongest, features)
    needed_F = np.full(places.fired.size, np.nan)
    needed_F[features] = np.log2(context.needed)
    measures = {"entropy": entropy.here, "entropy_before": entropy.before, "context": needed_F}
    parts = {
        part: correlations(measures, emergence_F, study.steps, seed=seed) for part, emergence_F in emergence.items()
    }
    return ComplexityResult(entropy, context, **parts)


def summary(complexity: ComplexityResult, revisions: Sequence[str]) -> dict[str, Any]:
    """The correlations."""
    needed = complexity.context.needed
    return {
        "complexity": {
            "features_measured": int(needed.size),
            "median_context": finite(np.median(needed)) if needed.size else None,
            "correlation_with_emergence": {
                part: {
                    measure: {name: finite(value) for name, value in dataclasses.asdict(found).items()}
                    for measure, found in correlations_of.items()
                }
                for part, correlations_of in (("all", complexity.all), ("emergent", complexity.emergent))
            },
        }
    }


COMPLEXITY = Analysis(
    "complexity",
    version=1,
    section="Complexity",
    definition="complexity without a language model's marks: entropy of the tokens at and before active positions, the "
    "context that the activation needs, and their correlations with emergence (ours)",
    result=ComplexityResult,
    compute=compute,
    summary=summary,
    settings=("complexity_features", "seed"),
    needs=(POSITIONS, LIFE),
)
