"""Evolution of features over the snapshots: one module a subject.

Every docstring says which definition is the paper's (P, arXiv 2509.17196) and which is ours. Functions take
plain arrays or tensors and return frozen dataclasses of numpy arrays.
"""

from __future__ import annotations

from crosscoder.evolution import planted
from crosscoder.evolution.dimensionality import (
    Dimensionality,
    KindDimensionality,
    feature_dimensionality,
    kind_dimensionality,
    random_dimensionality,
)
from crosscoder.evolution.examples import (
    ContextWindows,
    ExampleCollector,
    Examples,
    collect_examples,
    contexts,
    density_histogram,
)
from crosscoder.evolution.geometry import decoder_norms
from crosscoder.evolution.life_statistics import Compared, LifeIntervals, ShuffledLife, life_intervals, shuffled_life
from crosscoder.evolution.neighbours import Neighbours, nearest_neighbours
from crosscoder.evolution.ngrams import (
    EntropyLines,
    KneserNey,
    NgramCounts,
    NgramCurves,
    NgramMeter,
    NgramPhase,
    NgramTargets,
    count_ngrams,
    entropy_lines,
    measure_phase,
    ngram_targets,
    phase_curves,
)
from crosscoder.evolution.rotation import (
    CosineSummary,
    Rotation,
    TurningPoint,
    decoder_cosines,
    turning_point,
)
from crosscoder.evolution.strength import LifeCycles, ThresholdSweep, life_cycles, threshold_sweep

__all__ = [
    "Compared",
    "ContextWindows",
    "CosineSummary",
    "Dimensionality",
    "EntropyLines",
    "ExampleCollector",
    "Examples",
    "KindDimensionality",
    "KneserNey",
    "LifeCycles",
    "LifeIntervals",
    "Neighbours",
    "NgramCounts",
    "NgramCurves",
    "NgramMeter",
    "NgramPhase",
    "NgramTargets",
    "Rotation",
    "ShuffledLife",
    "ThresholdSweep",
    "TurningPoint",
    "collect_examples",
    "contexts",
    "count_ngrams",
    "decoder_cosines",
    "decoder_norms",
    "density_histogram",
    "entropy_lines",
    "feature_dimensionality",
    "kind_dimensionality",
    "life_cycles",
    "life_intervals",
    "measure_phase",
    "nearest_neighbours",
    "ngram_targets",
    "phase_curves",
    "planted",
    "random_dimensionality",
    "shuffled_life",
    "threshold_sweep",
    "turning_point",
]
