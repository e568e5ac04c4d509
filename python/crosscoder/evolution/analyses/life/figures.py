"""Figures of the lives of features.

Letters: F features, K snapshots, T thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosscoder.evolution.analyses.examples import ExamplesResult
from crosscoder.evolution.analyses.life.compute import SHOWN_KINDS, LifeResult
from crosscoder.evolution.strength import KIND_NAMES
from crosscoder.figures.results import Results
from crosscoder.figures.spec import SNAPSHOTS, Axis, Bars, Lines, Panel, Series
from crosscoder.figures.table import BINS, Column, FigureTable, histogram, plain_column

BAND = (0.1, 0.9)
"""Quantiles over features that bands are drawn between."""
PER_KIND = 9
"""Features of a kind that are drawn one by one."""
THRESHOLDS = "What the presence threshold decides"
"""A figure's title, which the page's notes name."""
Masks = Mapping[str, NDArray[np.bool_]]


def _living(life: LifeResult) -> dict[str, NDArray[np.bool_]]:
    """Kind -> (F,) its features that have a curve to show, for the kinds that have some."""
    alive_F = life.norms.max(axis=1) > 0
    masks = {name: mask & alive_F for name, mask in life.masks().items() if name != "dead"}
    return {name: mask for name, mask in masks.items() if mask.any()}


def _kind_series(kinds: Mapping[str, Any]) -> list[Series]:
    return [Series(name, name, colour=name) for name in kinds]


def _presence(life: LifeResult) -> str:
    return f"{life.cycles.threshold:g} of its maximum"


def _examples(life: LifeResult, rate_F: np.ndarray, members: np.ndarray) -> list[int]:
    """Features spread over emergence and peak, of those that fire most: shape is shown, not luck."""
    frequent = members[np.argsort(-rate_F[members], kind="stable")][: max(PER_KIND, members.size // 4)]
    order = frequent[np.lexsort((frequent, life.cycles.peak[frequent], life.cycles.emergence[frequent]))]
    picks = np.unique(np.linspace(0, order.size - 1, min(PER_KIND, order.size)).round().astype(int))
    return [int(feature) for feature in order[picks]]


def norms(life: LifeResult, results: Results) -> FigureTable | None:
    """Decoder norms by kind, and of some features."""
    examples, living = results.of(ExamplesResult), _living(life)
    if examples is None or not living:
        return None
    kinds = {name: mask for name, mask in living.items() if name in SHOWN_KINDS} or dict(list(living.items())[:2])
    names = ("series", "feature", "kind", "snapshot", "step", "norm", "q10", "q90")
    columns: dict[str, Column] = {name: [] for name in names}
    steps = plain_column(results.steps)
    n, relative_FK = len(steps), life.cycles.relative

    def add(series: str, feature: int | None, kind: str, curve: Any, low: Any = None, high: Any = None) -> None:
        ends = ([None] * n if end is None else plain_column(end) for end in (low, high))
        values = ([series] * n, [feature] * n, [kind] * n, range(n), steps, plain_column(curve), *ends)
        for name, added in zip(names, values, strict=True):
            columns[name].extend(added)

    for kind, mask in kinds.items():
        add("median", None, kind, *np.quantile(relative_FK[mask], (0.5, *BAND), axis=0))
    chosen = {kind: _examples(life, examples.firing_rate.max(axis=1), np.flatnonzero(kinds[kind])) for kind in kinds}
    for kind, features in chosen.items():
        for feature in features:
            add(f"feature {feature}", feature, kind, relative_FK[feature])
    panels = [
        Panel(
            Axis("norm / own maximum", domain=(0, 1)),
            [Series("norm", "norm", "q10", "q90", colour=kind)],
            f"{kind}, {int(mask.sum()):,} features",
            {"kind": kind},
            {"τ": life.cycles.threshold},
        )
        for kind, mask in kinds.items()
    ]
    return FigureTable(
        "norms",
        "Decoder norm against training step",
        "both",
        "Norm of a feature's decoder at each snapshot, divided by the feature's own maximum (the paper's "
        "measure of strength). Thick line and band: median, 10 % and 90 % quantiles over all features of the kind. "
        f"Thin lines: {sum(map(len, chosen.values()))} of them, spread over emergence among those that fire most; "
        "click one to open it. The kinds are told apart by our rule: a feature is present where its norm exceeds "
        f"{_presence(life)}; it is an initialization feature if present at the first snapshot, else emergent.",
        columns,
        Lines(panels, split="series"),
        wide=True,
    )


def _counts(kinds: Masks, values_F: np.ndarray, n_bins: int) -> dict[str, Column]:
    """Kind -> how many of its features have each value; negative ones are left out."""
    return {
        name: plain_column(np.bincount(values_F[mask & (values_F >= 0)], minlength=n_bins))
        for name, mask in kinds.items()
    }


def emergence(life: LifeResult, results: Results) -> FigureTable | None:
    """Emergence by kind."""
    kinds = _living(life)
    if not kinds:
        return None
    return FigureTable(
        "emergence",
        "When features emerge",
        "ours",
        "Features by the snapshot of their emergence, the first of two snapshots in a row at which the "
        f"norm exceeds {_presence(life)}. Features without an emergence are not counted. Snapshots are "
        "not evenly spaced in training steps.",
        results.by_snapshot | _counts(kinds, life.cycles.emergence, len(results.steps)),
        Bars("snapshot", SNAPSHOTS, Axis("features", "count"), _kind_series(kinds), lists=True),
    )


def lifetimes(life: LifeResult, results: Results) -> FigureTable | None:
    """Snapshots at which features are present, by kind."""
    kinds = _living(life)
    if not kinds:
        return None
    n = len(results.steps)
    snapshots_F = np.rint(life.cycles.lifetime.astype(np.float64) * n).astype(np.int64)
    back_F = life.cycles.revived & (life.norms.max(axis=1) > 0)
    columns: dict[str, Column] = {"snapshots": list(range(n + 1)), **_counts(kinds, snapshots_F, n + 1)}
    columns["come back"] = plain_column(np.bincount(snapshots_F[back_F], minlength=n + 1))
    n_living = sum(int(mask.sum()) for mask in kinds.values())
    return FigureTable(
        "lifetimes",
        "How long features live",
        "ours",
        f"Number of snapshots, of {n}, at which a feature's norm exceeds {_presence(life)}. The paper "
        "reports that most emergent features live in 60 % or more of its snapshots; one "
        f"that is born after 40 % of them cannot. {back_F.sum():,} of these {n_living:,} features disappear and come "
        "back.",
        columns,
        Bars("snapshots", f"snapshots present, of {n}", Axis("features", "count"), _kind_series(kinds)),
    )


def turnover(life: LifeResult, results: Results) -> FigureTable | None:
    """Births and deaths by snapshot."""
    columns = {"births": plain_column(life.cycles.births), "deaths": plain_column(life.cycles.deaths)}
    series = [Series("births", "births"), Series("deaths", "deaths")]
    return FigureTable(
        "turnover",
        "Births and deaths",
        "ours",
        "Features that become present at a snapshot (up) and features no longer present from it on (down).",
        results.by_snapshot | columns,
        Bars("snapshot", SNAPSHOTS, Axis("features", "count"), series, down=["deaths"]),
    )


def sharedness(life: LifeResult, results: Results) -> FigureTable | None:
    """Histogram of the entropy of norms over snapshots."""
    kinds = life.shown_kinds()
    if not kinds:
        return None
    middles, _ = histogram(np.zeros(0))
    columns: dict[str, Column] = {"sharedness": plain_column(middles)}
    columns |= {name: plain_column(histogram(life.cycles.sharedness[mask])[1]) for name, mask in kinds.items()}
    return FigureTable(
        "sharedness",
        "Sharedness",
        "ours",
        "Entropy of a feature's norms over the snapshots, divided by log K: 1 is equally strong everywhere, 0 is one "
        f"snapshot alone. Each bar is as wide as {1 / BINS:g}.",
        columns,
        Bars("sharedness", "entropy of norms / log K", Axis("features", "count"), _kind_series(kinds)),
    )


def rates(life: LifeResult, results: Results) -> FigureTable | None:
    """Births and deaths per decade of steps, births with their interval over features."""
    decades_K = np.append(np.nan, np.diff(np.log10(1 + np.asarray(results.steps, dtype=np.float64))))
    columns = results.by_snapshot | {
        "births": plain_column(life.cycles.births_per_log_step),
        "deaths": plain_column(life.cycles.deaths_per_log_step),
        "births, low": plain_column(life.interval.births_low / decades_K),
        "births, high": plain_column(life.interval.births_high / decades_K),
    }
    series = [Series("births", "births", "births, low", "births, high"), Series("deaths", "deaths")]
    return FigureTable(
        "rates",
        "Births and deaths by log step",
        "ours",
        "Births (deaths) between a snapshot and the one before it, per factor of ten in 1 + step: what counts by "
        f"snapshot would hide where snapshots are unevenly spaced. Band: {life.interval.level:.0%} interval of the "
        "births by a bootstrap over features; it says nothing about other seeds.",
        columns,
        Lines([Panel(Axis("features per decade of steps", "count", zero=True), series)]),
    )


def births_by_threshold(life: LifeResult, results: Results) -> FigureTable | None:
    """Births by snapshot, a line for each tau."""
    if not life.sweep.births.any():
        return None
    names = [f"τ = {tau:g}" for tau in life.sweep.thresholds]
    births = {name: plain_column(row_K) for name, row_K in zip(names, life.sweep.births, strict=True)}
    return FigureTable(
        "births_by_threshold",
        "Births at other thresholds",
        "ours",
        "Emergent features by the snapshot of their emergence, for each presence threshold τ.",
        results.by_snapshot | births,
        Lines([Panel(Axis("features", "count", zero=True), [Series(name, name) for name in names])]),
    )


def thresholds(life: LifeResult, results: Results) -> FigureTable | None:
    """Counts of kinds against tau."""
    sweep = life.sweep
    kinds = [name for code, name in enumerate(KIND_NAMES) if sweep.n_by_kind[:, code].any()]
    columns: dict[str, Column] = {"threshold": plain_column(sweep.thresholds)}
    columns |= {name: plain_column(sweep.n_by_kind[:, KIND_NAMES.index(name)]) for name in kinds}
    columns["same emergence"] = plain_column(sweep.same_emergence)
    panels = [
        Panel(Axis("features", "count", zero=True), [Series(name, name, colour=name) for name in kinds], "kinds"),
        Panel(Axis("features", "percent", domain=(0, 1)), [Series("same emergence", "same")], "the same emergence"),
    ]
    return FigureTable(
        "thresholds",
        THRESHOLDS,
        "ours",
        f"Kinds of features at other presence thresholds τ than the {sweep.reference:g} of this page, and the share "
        "of living features whose snapshot of emergence is the one at that threshold.",
        columns,
        Lines(panels, x="threshold", x_axis=Axis("presence threshold τ")),
        wide=True,
    )


FIGURES = (norms, emergence, lifetimes, turnover, sharedness, rates, births_by_threshold, thresholds)
