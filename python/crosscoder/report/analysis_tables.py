"""Figures straight from the results of analyses: each a function from `Results` to a table with its spec, or None.

A result without the arrays of a figure has none: what was not run leaves its figures out.
"""

from __future__ import annotations

from crosscoder.figures.table import FigureTable
from crosscoder.report.baseline_tables import frontier
from crosscoder.report.dimensionality_tables import within_kinds
from crosscoder.report.honesty_tables import disagreements, latent_scaling, separability, separability_by_norm
from crosscoder.report.life_tables import births_by_threshold, rates, sharedness, thresholds, to_final, to_previous
from crosscoder.report.results import Maker, Results
from crosscoder.report.stability_tables import (
    matched_by_emergence,
    matched_cosines,
    matched_emergence,
    matched_share,
)
from crosscoder.report.type_tables import (
    complexity,
    context_needed,
    explained_complexity,
    explanation_scores,
    explanations,
    type_counts,
    type_emergence,
    type_medians,
    type_pairs,
)

MAKERS: tuple[Maker, ...] = (
    sharedness,
    rates,
    births_by_threshold,
    thresholds,
    to_final,
    to_previous,
    within_kinds,
    type_counts,
    type_emergence,
    type_medians,
    type_pairs,
    complexity,
    context_needed,
    explained_complexity,
    explanation_scores,
    explanations,
    separability,
    separability_by_norm,
    latent_scaling,
    disagreements,
    matched_cosines,
    matched_share,
    matched_by_emergence,
    matched_emergence,
    frontier,
)
"""In the order of the page within a section."""


def analysis_tables(results: Results) -> list[FigureTable]:
    """The figures that the results have the numbers for."""
    return [table for table in (make(results) for make in MAKERS) if table is not None]
