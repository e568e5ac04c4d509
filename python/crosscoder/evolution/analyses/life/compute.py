"""When features are there: kinds, births, deaths and lifetimes, with intervals, a null, and other thresholds.

Letters: F features, K snapshots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosscoder.evolution.analyses.examples import EXAMPLES
from crosscoder.evolution.geometry import decoder_norms
from crosscoder.evolution.life_statistics import LifeIntervals, ShuffledLife, life_intervals, shuffled_life
from crosscoder.evolution.strength import EMERGENT, KIND_NAMES, LifeCycles, ThresholdSweep, life_cycles, threshold_sweep
from crosscoder.evolution.study import Study
from crosscoder.evolution.summary import finite
from crosscoder.figures.results import Results

SHOWN_KINDS = ("initialization", "emergent")
"""Kinds of features that figures tell apart."""


@dataclass(frozen=True)
class LifeResult:
    """The lives of all features."""

    norms: NDArray[np.float64]
    """(F, K) decoder norms for scaled activations."""
    cycles: LifeCycles
    interval: LifeIntervals
    null: ShuffledLife
    sweep: ThresholdSweep

    def masks(self) -> dict[str, NDArray[np.bool_]]:
        """Kind -> (F,) its features."""
        return {name: self.cycles.kind == code for code, name in enumerate(KIND_NAMES)}

    def emergence_by_part(self) -> dict[str, NDArray[np.int32]]:
        """(F,) emergence of all features, and of the emergent ones alone (-1 for the others)."""
        emergence_F = self.cycles.emergence
        return {"all": emergence_F, "emergent": np.where(self.cycles.kind == EMERGENT, emergence_F, -1)}

    def shown_kinds(self) -> dict[str, NDArray[np.bool_]]:
        """Kind -> (F,) its features, for the kinds that figures tell apart and that have features."""
        return {name: mask for name, mask in self.masks().items() if name in SHOWN_KINDS and mask.any()}

    def kind_of_features(self) -> NDArray[np.object_]:
        """(F,) the name of each feature's kind, "" of a kind that figures do not tell apart."""
        kind_F = np.full(len(self.cycles.kind), "", dtype=object)
        for name, mask in self.shown_kinds().items():
            kind_F[mask] = name
        return kind_F

    def emergence_steps(self) -> NDArray[np.float64]:
        """(F,) training step of emergence, NaN where there is none."""
        emergence_F = self.cycles.emergence
        return np.where(emergence_F >= 0, self.cycles.steps[emergence_F], np.nan)


def shown_kinds(results: Results) -> dict[str, NDArray[np.bool_]]:
    """`LifeResult.shown_kinds` of the results; empty without one."""
    life = results.of(LifeResult)
    return {} if life is None else life.shown_kinds()


def compute(study: Study) -> LifeResult:
    """From decoder norms; features that never fired are dead."""
    norms_FK = (decoder_norms(study.decoders).double() * study.decoder_scale.double()).numpy()
    alive_F = study.result(EXAMPLES).fired_any > 0
    tau, seed = study.settings.tau, study.settings.seed
    cycles = life_cycles(norms_FK, study.steps, threshold=tau, alive_F=alive_F)
    return LifeResult(
        norms=norms_FK,
        cycles=cycles,
        interval=life_intervals(cycles, seed=seed),
        null=shuffled_life(cycles, seed=seed),
        sweep=threshold_sweep(norms_FK, study.steps, reference=tau, alive_F=alive_F),
    )


def summary(life: LifeResult, revisions: Sequence[str]) -> dict[str, Any]:
    """Counts by kind, their intervals, and how much is order."""
    kinds = life.cycles.n_by_kind
    null = {name: getattr(life.null, name) for name in ("contiguous", "emergent", "largest_births", "excess_variation")}
    return {
        "features_by_kind": kinds,
        "n_initialization": kinds["initialization"],
        "n_emergent": kinds["emergent"],
        "presence_threshold": life.cycles.threshold,
        "life_intervals": _intervals(life.interval, revisions),
        "life_null": {
            name: {part: finite(getattr(compared, part)) for part in ("observed", "null_mean", "p")}
            for name, compared in null.items()
        },
    }


def _intervals(found: LifeIntervals, revisions: Sequence[str]) -> dict[str, Any]:
    """[low, high] of each figure."""

    def pairs(keys: Sequence[str], low: np.ndarray, high: np.ndarray) -> dict[str, list[float]]:
        return {key: [float(a), float(b)] for key, a, b in zip(keys, low, high, strict=True)}

    def pair(low: float, high: float) -> list[float] | None:
        return None if np.isnan(low) else [low, high]

    return {
        "level": found.level,
        "features_by_kind": pairs(KIND_NAMES, found.n_by_kind_low, found.n_by_kind_high),
        "births_by_snapshot": pairs(revisions, found.births_low, found.births_high),
        "median_emergence_step": pair(found.median_emergence_step_low, found.median_emergence_step_high),
        "median_lifetime": pair(found.median_lifetime_low, found.median_lifetime_high),
    }
