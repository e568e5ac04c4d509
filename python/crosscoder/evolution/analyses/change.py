"""How much of the features' change from snapshot to snapshot is turning, and how much is growing or shrinking.

For a decoder of norm n that becomes one of norm m, with the cosine c between the two, the squared length of the change
falls into two parts that add up exactly:

    |w - v|^2 = (m - n)^2 + 2 m n (1 - c)

The first is growing (m > n) or shrinking, the second turning. The definitions are ours.

Letters: F features, K snapshots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crosscoder.common.statistics import spearman
from crosscoder.errors import DataError
from crosscoder.evolution.analyses.life import LIFE
from crosscoder.evolution.analyses.rotation import ROTATION
from crosscoder.evolution.study import Analysis, Study
from crosscoder.evolution.summary import finite
from crosscoder.figures.results import Part, Results
from crosscoder.figures.spec import Axis, Lines, Panel, Series
from crosscoder.figures.table import FigureTable, plain_column

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Shares:
    """Of the squared change of some features between a snapshot and the one before, each (K,).

    NaN at index 0, and where no feature is present at both or none changes. The three shares add up to 1.
    """

    turning: Floats
    growing: Floats
    """Of features whose norm grows."""
    shrinking: Floats
    turning_random: Floats
    """The share of turning if each direction were a random one, of the same norm."""
    size: Floats
    """Sum of the squared changes / what it would be with random directions: 0 is no change, 1 no relation."""
    n: NDArray[np.int64]
    """Features present at both snapshots."""


@dataclass(frozen=True)
class ChangeResult:
    """Turning and growing, together and by kind."""

    overall: Shares
    by_kind: dict[str, Shares]
    """Kind -> over its features."""
    correlation: Floats
    """(K,) rank correlation over features of how much they turn, 1 - c, and how much their norm changes,
    |log(m / n)|; NaN for fewer than 3 features."""
    correlation_spread: Floats
    """(K,) its standard deviation if the two had nothing to do with each other, 1 / sqrt(n - 1)."""


def decoder_change(
    norms_FK: ArrayLike, to_previous_FK: ArrayLike, masks: dict[str, NDArray[np.bool_]] | None = None
) -> ChangeResult:
    """From decoder norms and cosines to the snapshot before, which are NaN where a feature does not take part.

    `masks`: kind -> (F,) its features. Raises `DataError` for shapes that do not match.
    """
    norms, cosines = np.asarray(norms_FK, dtype=np.float64), np.asarray(to_previous_FK, dtype=np.float64)
    if norms.shape != cosines.shape or norms.ndim != 2:
        raise DataError(f"norms {norms.shape} and cosines {cosines.shape} must be alike (F, K)")
    before = np.roll(norms, 1, axis=1)
    known = np.isfinite(cosines) & (norms > 0) & (before > 0)
    known[:, 0] = False
    shares = {
        name: _shares(norms[mask], before[mask], cosines[mask], known[mask])
        for name, mask in {"": np.ones(len(norms), dtype=bool), **(masks or {})}.items()
    }
    correlation, spread = np.full((2, norms.shape[1]), np.nan)
    for k in np.flatnonzero(known.sum(axis=0) >= 3):
        those = known[:, k]
        growth = np.abs(np.log(norms[those, k] / before[those, k]))
        correlation[k], spread[k] = spearman(1 - cosines[those, k], growth), 1 / np.sqrt(those.sum() - 1)
    return ChangeResult(shares.pop(""), shares, correlation, spread)


def _shares(norms_FK: Floats, before_FK: Floats, cosines_FK: Floats, known_FK: NDArray[np.bool_]) -> Shares:
    def total(values_FK: Floats) -> Floats:
        return np.asarray(np.where(known_FK, values_FK, 0).sum(axis=0))

    difference = norms_FK - before_FK
    growing, shrinking = total(np.maximum(difference, 0) ** 2), total(np.minimum(difference, 0) ** 2)
    turning = total(2 * norms_FK * before_FK * np.maximum(1 - cosines_FK, 0))  # rounding: a cosine just above 1
    random = total(norms_FK**2 + before_FK**2)
    change = growing + shrinking + turning

    def share(part: Floats, of: Floats) -> Floats:
        return np.asarray(np.divide(part, of, out=np.full(len(of), np.nan), where=of > 0))

    return Shares(
        turning=share(turning, change),
        growing=share(growing, change),
        shrinking=share(shrinking, change),
        turning_random=share(total(2 * norms_FK * before_FK), random),
        size=share(change, random),
        n=known_FK.sum(axis=0),
    )


def compute(study: Study) -> ChangeResult:
    """From the norms and cosines that other analyses have."""
    life = study.result(LIFE)
    return decoder_change(life.norms, study.result(ROTATION).to_previous, life.masks())


def summary(change: ChangeResult, revisions: Sequence[str]) -> dict[str, Any]:
    """By snapshot, each against the one before: nothing at the first."""

    def curve(values_K: Floats) -> dict[str, Any]:
        return {name: finite(value) for name, value in zip(revisions[1:], values_K[1:], strict=True)}

    overall = change.overall
    return {
        "change": {
            "turning_share_by_snapshot": curve(overall.turning),
            "turning_share_random_by_snapshot": curve(overall.turning_random),
            "size_by_snapshot": curve(overall.size),
            "correlation_by_snapshot": curve(change.correlation),
        }
    }


def shares(change: ChangeResult, results: Results) -> FigureTable | None:
    """Turning, growing and shrinking by snapshot, and how large the change is."""
    if not change.overall.n.any():
        return None
    overall = change.overall
    curves = {
        "turning": overall.turning,
        "growing": overall.growing,
        "shrinking": overall.shrinking,
        "random directions": overall.turning_random,
        "size": overall.size,
    }
    parts = [Series(name, name) for name in ("turning", "growing", "shrinking")]
    parts.append(Series("random directions", "turning of random directions", colour="all"))
    return FigureTable(
        "change",
        "Turning and growing",
        "ours",
        "Of the squared change of the decoders since the snapshot before, over the features present at both: the share "
        "that is turning, and that of norms that grow or shrink; dashed, the share of turning if directions were "
        "random. Beside it the size of the change: 1 is that of random directions with the same norms, 0 none at all.",
        results.by_snapshot | {name: plain_column(curve_K) for name, curve_K in curves.items()},
        Lines(
            [
                Panel(Axis("share of the change", "percent", domain=(0, 1)), parts, "what it is"),
                Panel(Axis("size of the change", zero=True), [Series("size", "size")], "how large it is"),
            ]
        ),
        wide=True,
    )


def turning_or_growing(change: ChangeResult, results: Results) -> str:
    """Where turning is most and least of the change, and whether what turns also grows."""
    if not np.isfinite(change.overall.turning).any():
        return ""
    turning_K, random_K, steps = change.overall.turning, change.overall.turning_random, results.steps
    least, most = int(np.nanargmin(turning_K)), int(np.nanargmax(turning_K))

    def told(k: int) -> str:
        return f"{turning_K[k]:.0%} (step {steps[k - 1]:,} to {steps[k]:,}; random directions: {random_K[k]:.0%})"

    sentence = (
        "Of the decoders' squared change from snapshot to snapshot, the share that is turning lies between "
        f"{told(least)} and {told(most)}; the rest is growing and shrinking"
    )
    known = np.isfinite(change.correlation)
    together = known & (change.correlation > 3 * np.where(known, change.correlation_spread, 0))
    if known.any():
        sentence += (
            f". Features that turn more also change their norm more at {int(together.sum())} of {int(known.sum())} "
            "snapshots (rank correlation above three times its spread without a relation)"
        )
    return f"{sentence}. Exact for this dictionary; how far other trainings differ is not known."


CHANGE = Analysis(
    "change",
    version=1,
    definition="how much of the squared change of the decoders from snapshot to snapshot is turning, growing and "
    "shrinking, over features present at both, beside random directions with the same norms; and whether features "
    "that turn also grow or shrink (ours)",
    result=ChangeResult,
    compute=compute,
    summary=summary,
    needs=(LIFE, ROTATION),
    page=Part(ChangeResult, "Rotation", (shares,), (turning_or_growing,)),
)
