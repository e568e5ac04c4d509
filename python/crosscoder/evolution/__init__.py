"""Evolution of features over the snapshots: one module a subject.

Every docstring says which definition is the paper's (P, arXiv 2509.17196) and which is ours. Functions of
decoders take a `Crosscoder` or its W_dec (F, K, D), the others plain arrays or tensors; all return frozen
dataclasses of numpy arrays.
"""

from __future__ import annotations

from crosscoder.evolution import planted
from crosscoder.evolution.complexity import ContextNeeded, TokenEntropy, context_needed, token_entropy
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
    KeptTokens,
    collect_examples,
    contexts,
    density_histogram,
    histogram_edges,
)
from crosscoder.evolution.geometry import decoder_norms
from crosscoder.evolution.latent_scaling import LatentScaling, ScalingSums, latent_scaling
from crosscoder.evolution.life_statistics import Compared, LifeIntervals, ShuffledLife, life_intervals, shuffled_life
from crosscoder.evolution.matching import Matching, match_features
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
from crosscoder.evolution.positions import Places, PositionCollector, Positions, collect_positions
from crosscoder.evolution.probes import (
    NormHonesty,
    Probes,
    ProbeTrainer,
    area_under_curve,
    fit_probes,
    norm_honesty,
    snapshot_areas,
    stratified_sample,
)
from crosscoder.evolution.reading import snapshot_reader
from crosscoder.evolution.rotation import (
    CosineSummary,
    Rotation,
    TurningPoint,
    decoder_cosines,
    turning_point,
)
from crosscoder.evolution.stability import Stability, compare_dictionaries
from crosscoder.evolution.strength import LifeCycles, ThresholdSweep, life_cycles, threshold_sweep
from crosscoder.evolution.types import (
    EmergenceByType,
    FeatureTypes,
    InductionResponse,
    emergence_by_type,
    feature_types,
    induction_responses,
)

__all__ = [
    "Compared",
    "ContextNeeded",
    "ContextWindows",
    "CosineSummary",
    "Dimensionality",
    "EmergenceByType",
    "EntropyLines",
    "ExampleCollector",
    "Examples",
    "FeatureTypes",
    "InductionResponse",
    "KeptTokens",
    "KindDimensionality",
    "KneserNey",
    "LatentScaling",
    "LifeCycles",
    "LifeIntervals",
    "Matching",
    "Neighbours",
    "NgramCounts",
    "NgramCurves",
    "NgramMeter",
    "NgramPhase",
    "NgramTargets",
    "NormHonesty",
    "Places",
    "PositionCollector",
    "Positions",
    "ProbeTrainer",
    "Probes",
    "Rotation",
    "ScalingSums",
    "ShuffledLife",
    "Stability",
    "ThresholdSweep",
    "TokenEntropy",
    "TurningPoint",
    "area_under_curve",
    "collect_examples",
    "collect_positions",
    "compare_dictionaries",
    "context_needed",
    "contexts",
    "count_ngrams",
    "decoder_cosines",
    "decoder_norms",
    "density_histogram",
    "emergence_by_type",
    "entropy_lines",
    "feature_dimensionality",
    "feature_types",
    "fit_probes",
    "histogram_edges",
    "induction_responses",
    "kind_dimensionality",
    "latent_scaling",
    "life_cycles",
    "life_intervals",
    "match_features",
    "measure_phase",
    "nearest_neighbours",
    "ngram_targets",
    "norm_honesty",
    "phase_curves",
    "planted",
    "random_dimensionality",
    "shuffled_life",
    "snapshot_areas",
    "snapshot_reader",
    "stratified_sample",
    "threshold_sweep",
    "token_entropy",
    "turning_point",
]
