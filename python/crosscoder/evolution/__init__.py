"""Evolution of features over the snapshots: one module a subject.

Every docstring says which definition is the paper's (P, arXiv 2509.17196) and which is ours. Functions of
decoders take a `Crosscoder` or its W_dec (F, K, D), the others plain arrays or tensors; all return frozen
dataclasses of numpy arrays. `crosscoder.evolution.analyses` computes them for a run.

The names below are loaded on first use, and with them torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosscoder.evolution import planted as planted
    from crosscoder.evolution.complexity import ContextNeeded as ContextNeeded
    from crosscoder.evolution.complexity import TokenEntropy as TokenEntropy
    from crosscoder.evolution.complexity import context_needed as context_needed
    from crosscoder.evolution.complexity import token_entropy as token_entropy
    from crosscoder.evolution.dimensionality import Dimensionality as Dimensionality
    from crosscoder.evolution.dimensionality import KindDimensionality as KindDimensionality
    from crosscoder.evolution.dimensionality import feature_dimensionality as feature_dimensionality
    from crosscoder.evolution.dimensionality import kind_dimensionality as kind_dimensionality
    from crosscoder.evolution.dimensionality import random_dimensionality as random_dimensionality
    from crosscoder.evolution.examples import ContextWindows as ContextWindows
    from crosscoder.evolution.examples import ExampleCollector as ExampleCollector
    from crosscoder.evolution.examples import Examples as Examples
    from crosscoder.evolution.examples import KeptTokens as KeptTokens
    from crosscoder.evolution.examples import collect_examples as collect_examples
    from crosscoder.evolution.examples import contexts as contexts
    from crosscoder.evolution.examples import density_histogram as density_histogram
    from crosscoder.evolution.examples import histogram_edges as histogram_edges
    from crosscoder.evolution.geometry import decoder_norms as decoder_norms
    from crosscoder.evolution.latent_scaling import LatentScaling as LatentScaling
    from crosscoder.evolution.latent_scaling import ScalingSums as ScalingSums
    from crosscoder.evolution.life_statistics import Compared as Compared
    from crosscoder.evolution.life_statistics import LifeIntervals as LifeIntervals
    from crosscoder.evolution.life_statistics import ShuffledLife as ShuffledLife
    from crosscoder.evolution.life_statistics import life_intervals as life_intervals
    from crosscoder.evolution.life_statistics import shuffled_life as shuffled_life
    from crosscoder.evolution.matching import Matching as Matching
    from crosscoder.evolution.matching import match_features as match_features
    from crosscoder.evolution.neighbours import Neighbours as Neighbours
    from crosscoder.evolution.neighbours import nearest_neighbours as nearest_neighbours
    from crosscoder.evolution.ngrams import EntropyLines as EntropyLines
    from crosscoder.evolution.ngrams import KneserNey as KneserNey
    from crosscoder.evolution.ngrams import NgramCounts as NgramCounts
    from crosscoder.evolution.ngrams import NgramCurves as NgramCurves
    from crosscoder.evolution.ngrams import NgramMeter as NgramMeter
    from crosscoder.evolution.ngrams import NgramPhase as NgramPhase
    from crosscoder.evolution.ngrams import NgramTargets as NgramTargets
    from crosscoder.evolution.ngrams import count_ngrams as count_ngrams
    from crosscoder.evolution.ngrams import entropy_lines as entropy_lines
    from crosscoder.evolution.ngrams import measure_phase as measure_phase
    from crosscoder.evolution.ngrams import ngram_targets as ngram_targets
    from crosscoder.evolution.ngrams import phase_curves as phase_curves
    from crosscoder.evolution.positions import Places as Places
    from crosscoder.evolution.positions import PositionCollector as PositionCollector
    from crosscoder.evolution.positions import Positions as Positions
    from crosscoder.evolution.positions import collect_positions as collect_positions
    from crosscoder.evolution.probes import NormHonesty as NormHonesty
    from crosscoder.evolution.probes import Probes as Probes
    from crosscoder.evolution.probes import ProbeTrainer as ProbeTrainer
    from crosscoder.evolution.probes import area_under_curve as area_under_curve
    from crosscoder.evolution.probes import fit_probes as fit_probes
    from crosscoder.evolution.probes import norm_honesty as norm_honesty
    from crosscoder.evolution.probes import snapshot_areas as snapshot_areas
    from crosscoder.evolution.probes import stratified_sample as stratified_sample
    from crosscoder.evolution.reading import snapshot_reader as snapshot_reader
    from crosscoder.evolution.rotation import CosineSummary as CosineSummary
    from crosscoder.evolution.rotation import Rotation as Rotation
    from crosscoder.evolution.rotation import TurningPoint as TurningPoint
    from crosscoder.evolution.rotation import decoder_cosines as decoder_cosines
    from crosscoder.evolution.rotation import turning_point as turning_point
    from crosscoder.evolution.stability import Stability as Stability
    from crosscoder.evolution.stability import compare_dictionaries as compare_dictionaries
    from crosscoder.evolution.strength import LifeCycles as LifeCycles
    from crosscoder.evolution.strength import ThresholdSweep as ThresholdSweep
    from crosscoder.evolution.strength import life_cycles as life_cycles
    from crosscoder.evolution.strength import threshold_sweep as threshold_sweep
    from crosscoder.evolution.types import EmergenceByType as EmergenceByType
    from crosscoder.evolution.types import FeatureTypes as FeatureTypes
    from crosscoder.evolution.types import InductionResponse as InductionResponse
    from crosscoder.evolution.types import emergence_by_type as emergence_by_type
    from crosscoder.evolution.types import feature_types as feature_types
    from crosscoder.evolution.types import induction_responses as induction_responses

_NAMES = {
    "complexity": "ContextNeeded TokenEntropy context_needed token_entropy",
    "dimensionality": (
        "Dimensionality KindDimensionality feature_dimensionality kind_dimensionality random_dimensionality"
    ),
    "examples": (
        "ContextWindows ExampleCollector Examples KeptTokens collect_examples contexts density_histogram "
        "histogram_edges"
    ),
    "geometry": "decoder_norms",
    "latent_scaling": "LatentScaling ScalingSums",
    "life_statistics": "Compared LifeIntervals ShuffledLife life_intervals shuffled_life",
    "matching": "Matching match_features",
    "neighbours": "Neighbours nearest_neighbours",
    "ngrams": (
        "EntropyLines KneserNey NgramCounts NgramCurves NgramMeter NgramPhase NgramTargets count_ngrams "
        "entropy_lines measure_phase ngram_targets phase_curves"
    ),
    "positions": "Places PositionCollector Positions collect_positions",
    "probes": (
        "NormHonesty Probes ProbeTrainer area_under_curve fit_probes norm_honesty snapshot_areas stratified_sample"
    ),
    "reading": "snapshot_reader",
    "rotation": "CosineSummary Rotation TurningPoint decoder_cosines turning_point",
    "stability": "Stability compare_dictionaries",
    "strength": "LifeCycles ThresholdSweep life_cycles threshold_sweep",
    "types": "EmergenceByType FeatureTypes InductionResponse emergence_by_type feature_types induction_responses",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [*sorted(_HOMES), "planted"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name == "planted":
        return importlib.import_module(f"{__name__}.planted")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
