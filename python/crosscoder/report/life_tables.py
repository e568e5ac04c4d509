"""Figures of the lives of features and of how their directions turn, from results.

Letters: F features, K snapshots, T thresholds.
"""

from __future__ import annotations

import numpy as np

from crosscoder.evolution.strength import KIND_NAMES
from crosscoder.figures.spec import Axis, Bars, Lines, Panel, Series
from crosscoder.figures.table import Column, FigureTable, plain_column
from crosscoder.report.results import Results
from crosscoder.report.sections import ROTATION, STRENGTH

BINS = 20
"""Bars of a histogram over [0, 1]."""
THRESHOLDS = "What the presence threshold decides"
"""A figure's title, which the page's notes name."""


def sharedness(results: Results) -> FigureTable | None:
    """Histogram of the entropy of norms over snapshots."""
    found, kinds = results.get("life", "cycles.sharedness"), results.kinds
    if found is None or not kinds:
        return None
    edges = np.linspace(0, 1, BINS + 1)
    columns: dict[str, Column] = {"sharedness": plain_column((edges[:-1] + edges[1:]) / 2)}
    for name, mask in kinds.items():
        values = found[0][mask]
        columns[name] = plain_column(np.histogram(values[np.isfinite(values)].clip(0, 1), edges)[0])
    return FigureTable(
        "sharedness",
        STRENGTH,
        "Sharedness",
        "ours",
        "Entropy of a feature's norms over the snapshots, divided by log K: 1 is equally strong everywhere, 0 is one "
        "snapshot alone. Each bar is as wide as 0.05.",
        columns,
        Bars(
            "sharedness", "entropy of norms / log K", Axis("features", "count"), [Series(n, n, colour=n) for n in kinds]
        ),
    )


def thresholds(results: Results) -> FigureTable | None:
    """Counts of kinds against tau."""
    found = results.get("life", "sweep.thresholds", "sweep.n_by_kind", "sweep.same_emergence", "sweep.reference")
    if found is None:
        return None
    taus_T, counts_T4, same_T, reference = found
    shown = [code for code, name in enumerate(KIND_NAMES) if counts_T4[:, code].any()]
    columns: dict[str, Column] = {"threshold": plain_column(taus_T)}
    columns.update({KIND_NAMES[code]: plain_column(counts_T4[:, code]) for code in shown})
    columns["same emergence"] = plain_column(same_T)
    kinds = [Series(KIND_NAMES[code], KIND_NAMES[code], colour=KIND_NAMES[code]) for code in shown]
    return FigureTable(
        "thresholds",
        STRENGTH,
        THRESHOLDS,
        "ours",
        f"Kinds of features at other presence thresholds τ than the {float(reference):g} of this page, and the share "
        "of living features whose snapshot of emergence is the one at that threshold.",
        columns,
        Lines(
            [
                Panel(Axis("features", "count", zero=True), kinds, "kinds"),
                Panel(
                    Axis("features", "percent", domain=(0, 1)), [Series("same emergence", "same")], "the same emergence"
                ),
            ],
            x="threshold",
            x_axis=Axis("presence threshold τ"),
        ),
        wide=True,
    )


def births_by_threshold(results: Results) -> FigureTable | None:
    """Births by snapshot, a line for each tau."""
    found = results.get("life", "sweep.thresholds", "sweep.births")
    if found is None or not found[1].any():
        return None
    names = [f"τ = {tau:g}" for tau in found[0]]
    columns = {**results.by_snapshot, **{name: plain_column(row) for name, row in zip(names, found[1], strict=True)}}
    return FigureTable(
        "births_by_threshold",
        STRENGTH,
        "Births at other thresholds",
        "ours",
        "Emergent features by the snapshot of their emergence, for each presence threshold τ.",
        columns,
        Lines([Panel(Axis("features", "count", zero=True), [Series(name, name) for name in names])]),
    )


def rates(results: Results) -> FigureTable | None:
    """Births and deaths per decade of steps, births with the interval over features where it was estimated."""
    found = results.get("life", "cycles.births_per_log_step", "cycles.deaths_per_log_step")
    if found is None:
        return None
    columns = results.by_snapshot
    columns.update({"births": plain_column(found[0]), "deaths": plain_column(found[1])})
    births, caption = Series("births", "births"), ""
    interval = results.get("life", "interval.births_low", "interval.births_high", "interval.level")
    if interval is not None:
        decades_K = np.append(np.nan, np.diff(np.log10(1 + np.asarray(results.steps, dtype=np.float64))))
        columns["births, low"], columns["births, high"] = (plain_column(ends_K / decades_K) for ends_K in interval[:2])
        births = Series("births", "births", "births, low", "births, high")
        caption = (
            f" Band: {float(interval[2]):.0%} interval of the births by a bootstrap over features; it says nothing "
            "about other seeds."
        )
    return FigureTable(
        "rates",
        STRENGTH,
        "Births and deaths by log step",
        "ours",
        "Births (deaths) between a snapshot and the one before it, per factor of ten in 1 + step: what counts by "
        f"snapshot would hide where snapshots are unevenly spaced.{caption}",
        columns,
        Lines(
            [
                Panel(
                    Axis("features per decade of steps", "count", zero=True),
                    [births, Series("deaths", "deaths")],
                )
            ]
        ),
    )


def _cosine_curves(results: Results, array: str, key: str, title: str, caption: str) -> FigureTable | None:
    found, kinds = results.get("rotation", array), results.kinds
    if found is None or not kinds:
        return None
    columns = results.by_snapshot
    series = []
    for name, mask in kinds.items():
        cosines_FK = found[0][mask].astype(np.float64)
        known_K = np.isfinite(cosines_FK).any(axis=0)
        quantiles = np.full((3, len(known_K)), np.nan)
        quantiles[:, known_K] = np.nanquantile(cosines_FK[:, known_K], (0.5, 0.1, 0.9), axis=0)
        for column, curve in zip((name, f"{name}, q10", f"{name}, q90"), quantiles, strict=True):
            columns[column] = plain_column(curve)
        series.append(Series(name, name, f"{name}, q10", f"{name}, q90", colour=name))
    panel = Panel(Axis("cosine", zero=True), series)
    return FigureTable(key, ROTATION, title, "ours", caption, columns, Lines([panel]))


def to_final(results: Results) -> FigureTable | None:
    """Cosine to the last snapshot's direction."""
    return _cosine_curves(
        results,
        "to_final",
        "to_final",
        "Cosine to the final direction",
        "Cosine of a feature's decoder direction to its own at the last snapshot, over the features present at both: "
        "median, 10 % and 90 % quantiles, by kind.",
    )


def to_previous(results: Results) -> FigureTable | None:
    """Cosine to the snapshot before."""
    return _cosine_curves(
        results,
        "to_previous",
        "to_previous",
        "Cosine to the snapshot before",
        "As beside, to the direction at the snapshot before: how fast directions turn now. Snapshots are not evenly "
        "spaced in steps.",
    )
