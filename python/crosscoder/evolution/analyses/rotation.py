"""How the directions of features turn from snapshot to snapshot, and where most of them turn.

Letters: F features, K snapshots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscoder.evolution.analyses.life import LIFE, SHOWN_KINDS, shown_kinds
from crosscoder.evolution.rotation import Cosines, TurningPoint, decoder_cosines, turning_point
from crosscoder.evolution.study import Analysis, Study
from crosscoder.evolution.summary import finite
from crosscoder.figures.results import Part, Results
from crosscoder.figures.spec import Axis, Heat, Lines, Measure, Panel, Series
from crosscoder.figures.table import Column, FigureTable, plain_column


@dataclass(frozen=True)
class RotationResult(Cosines):
    """Cosines between decoder directions, and where they split the snapshots in two."""

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


def _turn(rotation: RotationResult) -> TurningPoint | None:
    """The best split of the snapshots, where there is one."""
    return rotation.turning_point if np.isfinite(rotation.turning_point.step) else None


def split_name(turn: TurningPoint) -> str:
    """What the split of the snapshots is called where it is drawn."""
    return "turning point" if turn.is_sharp else "best split (no sharp turn)"


def cosines(rotation: RotationResult, results: Results) -> FigureTable | None:
    """Mean cosine of every two snapshots, with quantiles and by kind."""
    n, steps, overall = len(results.steps), plain_column(results.steps), rotation.overall
    rows, others = np.divmod(np.arange(n * n), n)
    columns: dict[str, Column] = {
        "snapshot": plain_column(rows),
        "step": [steps[row] for row in rows],
        "other_snapshot": plain_column(others),
        "other_step": [steps[other] for other in others],
        "mean": plain_column(overall.mean.ravel()),
    }
    measures = [Measure("mean", "mean", (0, 1))]
    for level, matrix_KK in zip(rotation.levels, overall.quantiles, strict=True):
        columns[f"q{level:g}"] = plain_column(matrix_KK.ravel())
        measures.append(Measure(f"q{level:g}", f"{100 * level:g} % quantile", (0, 1)))
    for kind in SHOWN_KINDS:
        if rotation.by_mask[kind].counts.any():
            columns[f"mean, {kind}"] = plain_column(rotation.by_mask[kind].mean.ravel())
            measures.append(Measure(f"mean, {kind}", f"mean, {kind} features", (0, 1)))
    columns["n_features"] = plain_column(overall.counts.ravel())
    columns["null"] = plain_column(rotation.turning_point.null_mean.ravel())
    turn, split = _turn(rotation), ""
    if turn is not None:
        what = "the turning point, our change-point estimate" if turn.is_sharp else (
            "the best split of the snapshots in two, which is no sharp turn here (see the text above)"
        )  # fmt: skip
        split = f" White, broken: {what}, with {_interval(turn)}."
    return FigureTable(
        "cosines",
        "Rotation of decoder directions",
        "paper" if turn is None else "both",
        "Mean cosine between a feature's decoder directions at two snapshots (as in the paper's Figure 3c), over the "
        f"features alive at both.{split} Null: the spread of a mean cosine of random directions, the level of no "
        "relation.",
        columns,
        Heat(
            "other_snapshot", "snapshot", "training step", "training step", measures, ["n_features", "null"],
            square=True,
        ),
        {
            "turning": None if turn is None else {
                "name": split_name(turn), "sharp": turn.is_sharp, "step": turn.step, "low": turn.step_low,
                "high": turn.step_high, "level": turn.level,
            }
        },
    )  # fmt: skip


def _interval(turn: TurningPoint) -> str:
    return f"its {100 * turn.level:g} % bootstrap interval"


def _curves(results: Results, key: str, cosines_FK: np.ndarray, title: str, caption: str) -> FigureTable | None:
    """Median and quantiles over the features of each kind."""
    kinds = shown_kinds(results)
    if not kinds:
        return None
    columns, series = results.by_snapshot, []
    for name, mask in kinds.items():
        of_kind = cosines_FK[mask].astype(np.float64)
        known_K = np.isfinite(of_kind).any(axis=0)
        quantiles = np.full((3, of_kind.shape[1]), np.nan)
        quantiles[:, known_K] = np.nanquantile(of_kind[:, known_K], (0.5, 0.1, 0.9), axis=0)
        names = (name, f"{name}, q10", f"{name}, q90")
        columns |= {column: plain_column(curve_K) for column, curve_K in zip(names, quantiles, strict=True)}
        series.append(Series(name, *names, colour=name))
    return FigureTable(key, title, "ours", caption, columns, Lines([Panel(Axis("cosine", zero=True), series)]))


def to_final(rotation: RotationResult, results: Results) -> FigureTable | None:
    """Cosine to the last snapshot's direction."""
    return _curves(
        results,
        "to_final",
        rotation.to_final,
        "Cosine to the final direction",
        "Cosine of a feature's decoder direction to its own at the last snapshot, over the features present at both: "
        "median, 10 % and 90 % quantiles, by kind.",
    )


def to_previous(rotation: RotationResult, results: Results) -> FigureTable | None:
    """Cosine to the snapshot before."""
    return _curves(
        results,
        "to_previous",
        rotation.to_previous,
        "Cosine to the snapshot before",
        "As beside, to the direction at the snapshot before: how fast directions turn now. Snapshots are not evenly "
        "spaced in steps.",
    )


def phases(results: Results) -> tuple[str, list[dict[str, Any]]]:
    """For figures over training steps: what the split of the snapshots parts, in words, and the split as a mark."""
    rotation = results.of(RotationResult)
    turn = None if rotation is None else _turn(rotation)
    if turn is None:
        return "", []
    interval = _interval(turn)
    words = f"the turning point of decoder directions with {interval} parts them (shaded)." if turn.is_sharp else (
        f"decoder directions show no sharp turn here that parts them; shaded is their best split with {interval}."
    )  # fmt: skip
    label = "directions turn" if turn.is_sharp else "best split"
    return words, [{"step": turn.step, "low": turn.step_low, "high": turn.step_high, "label": label}]


def turning(rotation: RotationResult, results: Results) -> str:
    """Whether the directions turn at some step."""
    turn = rotation.turning_point
    p = f"p = {turn.p_shuffled:.2g} against shuffled snapshots, {turn.p_random:.2g} against random directions"
    if not turn.is_split:
        return (
            "No turning point is shown: no difference from shuffled snapshots in how well a split of the snapshots in "
            f"two explains the rotation of the decoder directions ({p})."
        )
    where = (
        f"between steps {turn.step_before:,.0f} and {turn.step_after:,.0f} ({turn.level:.0%} interval over features: "
        f"steps {turn.step_low:,.0f} to {turn.step_high:,.0f})"
    )
    cosines = f"cosines average {turn.within:.2f} on the same side and {turn.across:.2f} across ({p})"
    split, drift = f"{turn.explained_by_blocks:.0%}", f"{turn.explained_by_lag:.0%}"
    if turn.is_sharp:
        return (
            f"Decoder directions turn {where}: {cosines}; such a split accounts for {split} of how the cosines vary, a "
            f"steady drift for {drift}."
        )
    return (
        f"Decoder directions make no sharp turn: a steady drift accounts for {drift} of how their cosines vary, the "
        f"best split of the snapshots in two for no more than {split}. If there is a turn, it lies {where}: {cosines}."
    )


ROTATION = Analysis(
    "rotation",
    version=1,
    definition="cosines of decoder directions between snapshots (the paper's), over features present at both; turning "
    "point with bootstrap interval and nulls (ours)",
    result=RotationResult,
    compute=compute,
    summary=summary,
    settings=("seed",),
    needs=(LIFE,),
    page=Part(RotationResult, "Rotation", (cosines, to_final, to_previous), (turning,)),
    required=True,
)
