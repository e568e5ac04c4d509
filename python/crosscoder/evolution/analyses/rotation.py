"""How the directions of features turn from snapshot to snapshot, and where most of them turn.

Letters: F features, K snapshots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosscoder.evolution.analyses.life import LIFE
from crosscoder.evolution.rotation import CosineSummary, TurningPoint, decoder_cosines, turning_point
from crosscoder.evolution.study import Analysis, Study
from crosscoder.evolution.summary import finite


@dataclass(frozen=True)
class RotationResult:
    """Cosines between decoder directions, and where they split the snapshots in two."""

    overall: CosineSummary
    by_mask: dict[str, CosineSummary]
    """Kind -> over its features."""
    levels: tuple[float, ...]
    """(Q,) levels of the quantiles."""
    to_final: NDArray[np.float32]
    """(F, K) cosine to the direction at the last snapshot; NaN unless present at both."""
    to_previous: NDArray[np.float32]
    """(F, K) cosine to the direction at the snapshot before; NaN unless present at both, and at k = 0."""
    turning_point: TurningPoint


def compute(study: Study) -> RotationResult:
    """One pass over the decoders."""
    life, seed = study.result(LIFE), study.settings.seed
    found = decoder_cosines(study.decoders, life.cycles.present, masks=life.masks(), seed=seed)
    return RotationResult(
        overall=found.overall,
        by_mask=found.by_mask,
        levels=found.levels,
        to_final=found.to_final,
        to_previous=found.to_previous,
        turning_point=turning_point(found, study.steps, seed=seed),
    )


def summary(rotation: RotationResult, revisions: Sequence[str]) -> dict[str, Any]:
    """The turning point, and what speaks for it."""
    interval, explained = ("step_low", "step_high", "level"), ("explained_by_blocks", "explained_by_lag")
    names = ("step", *interval, "within", "across", "p_shuffled", "p_random", *explained)
    return {"turning_point": {name: finite(getattr(rotation.turning_point, name)) for name in names}}


ROTATION = Analysis(
    "rotation",
    version=1,
    section="Rotation",
    definition="cosines of decoder directions between snapshots (the paper's), over features present at both; turning "
    "point with bootstrap interval and nulls (ours)",
    result=RotationResult,
    compute=compute,
    summary=summary,
    settings=("seed",),
    needs=(LIFE,),
)
