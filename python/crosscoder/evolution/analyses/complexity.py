"""How complex features are by the text alone, and whether complex ones emerge later."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscoder.common.statistics import Correlation
from crosscoder.evolution.analyses.life import LIFE, LifeResult
from crosscoder.evolution.analyses.positions import POSITIONS
from crosscoder.evolution.complexity import (
    STAYS,
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
from crosscoder.figures.results import Part, Results
from crosscoder.figures.spec import Axis, Scatter
from crosscoder.figures.table import Column, FigureTable, drawn, plain_column


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


def _correlations(found: ComplexityResult, measure: str) -> str:
    """ "Spearman 0.43 (95 % interval 0.25 to 0.59, p = 0.001, 84 emergent features)", of all and of the emergent."""
    words = [
        f"Spearman {one.spearman:.2f} (95 % interval {one.spearman_low:.2f} to {one.spearman_high:.2f}, p = "
        f"{one.spearman_p:.2g} by permutation, {one.n:,.0f} {part} features)"
        for part, by_measure in (("all", found.all), ("emergent", found.emergent))
        if np.isfinite((one := by_measure[measure]).spearman)
    ]
    return f"{'; '.join(words)}{'.' if words else ''}"


def _against_emergence(
    life: LifeResult, key: str, title: str, caption: str, features: np.ndarray, y: np.ndarray, y_axis: Axis
) -> FigureTable:
    kinds = life.shown_kinds()
    columns: dict[str, Column] = {
        "feature": [int(feature) for feature in features],
        "kind": list(life.kind_of_features()[features]),
        "step": [int(step) for step in life.emergence_steps()[features]],
        y_axis.label: plain_column(y),
    }
    spec = Scatter("step", None, y_axis.label, y_axis, "kind", list(kinds), jitter=True)
    return FigureTable(key, title, "ours", caption.strip(), columns, spec)


def entropy_and_emergence(found: ComplexityResult, results: Results) -> FigureTable | None:
    """Entropy of the token at active positions against emergence."""
    life = results.of(LifeResult)
    if life is None:
        return None
    entropy_F = found.entropy.here
    features, sentence = drawn(np.flatnonzero(np.isfinite(entropy_F) & np.isfinite(life.emergence_steps())))
    if not features.size:
        return None
    return _against_emergence(
        life,
        "complexity",
        "Entropy of the tokens against emergence",
        "Entropy of the tokens at randomly chosen active positions (Chao and Shen's estimate): 0 for one token, more "
        f"for a feature that many tokens set off. {sentence} Points are spread a little; hover names the feature, a "
        f"click opens it. {_correlations(found, 'entropy')}",
        features,
        entropy_F[features],
        Axis("entropy, nats", zero=True),
    )


def context_and_emergence(found: ComplexityResult, results: Results) -> FigureTable | None:
    """How far back a feature's input must be kept, against emergence."""
    life = results.of(LifeResult)
    if life is None:
        return None
    features, needed = found.context.feature, found.context.needed
    known = np.isfinite(life.emergence_steps()[features])
    if not known.any():
        return None
    return _against_emergence(
        life,
        "context_needed",
        "Context that features need, against emergence",
        f"Tokens that must be kept for the activation to stay at {STAYS:.0%} of itself or more at the strongest "
        f"positions; for {known.sum():,} features, drawn evenly over the snapshots of emergence, which bends the "
        f"correlation over all of them. {_correlations(found, 'context')}",
        features[known],
        needed[known],
        Axis("context needed, tokens", "count", "log"),
    )


def complex_later(found: ComplexityResult, results: Results) -> str:
    """Whether what is complex emerges later."""
    parts, sure = [], True
    for measure, words in (("entropy", "the entropy of their tokens"), ("context", "the context that they need")):
        one = found.emergent[measure]
        if np.isfinite(one.spearman):
            parts.append(
                f"{words} {one.spearman:.2f} (95 % interval {one.spearman_low:.2f} to {one.spearman_high:.2f}, p = "
                f"{one.spearman_p:.2g}, {one.n:,.0f} features)"
            )
            sure = sure and one.spearman_p <= 0.05 and one.spearman > 0
    if not parts:
        return ""
    start = "Emergent features that emerge later are more complex" if sure else (
        "Whether emergent features that emerge later are more complex is not settled"
    )  # fmt: skip
    return f"{start}: rank correlation of emergence with {', with '.join(parts)}."


SECTION = "Complexity"

COMPLEXITY = Analysis(
    "complexity",
    version=1,
    definition="complexity without a language model's marks: entropy of the tokens at and before active positions, the "
    "context that the activation needs, and their correlations with emergence (ours)",
    result=ComplexityResult,
    compute=compute,
    summary=summary,
    settings=("complexity_features", "seed"),
    needs=(POSITIONS, LIFE),
    page=Part(ComplexityResult, SECTION, (entropy_and_emergence, context_and_emergence), (complex_later,)),
)
