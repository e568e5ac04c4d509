"""Figures of the dictionary matched with those of other runs (`crosscoder compare`), from results.

Letters: F features of this run, K snapshots.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from crosscoder.common.arrays import Arrays
from crosscoder.evolution.matching import FLOOR
from crosscoder.evolution.stability import STABLE
from crosscoder.figures.spec import Axis, Heat, Lines, Measure, Panel, Series
from crosscoder.figures.table import Column, FigureTable, plain_column
from crosscoder.report.results import Results
from crosscoder.report.sections import STABILITY

BINS = 20
"""Of a histogram over [0, 1]."""
COSINE = Axis("cosine", domain=(0, 1))


def matched_cosines(results: Results) -> FigureTable | None:
    """Histograms of the matched cosines by kind, beside the nearest random direction's."""
    edges = np.linspace(0, 1, BINS + 1)
    columns: dict[str, Column] = {name: [] for name in ("run", "kind", "cosine", "features", "matched", "null")}
    kinds: dict[str, None] = {}
    for name, found in results.comparisons.items():
        for kind, members in _compared_kinds(results, found):
            kinds[kind] = None
            columns["run"] += [name] * BINS
            columns["kind"] += [kind] * BINS
            columns["cosine"] += plain_column((edges[:-1] + edges[1:]) / 2)
            columns["features"] += [int(members.sum())] * BINS
            for column, cosines_F in (("matched", "matching.cosine"), ("null", "nearest_null")):
                known = found[cosines_F][members & np.isfinite(found[cosines_F])]
                counts = np.histogram(known.clip(0, 1), edges)[0]
                # the null is a sample: a kind that it has no feature of has no null, not one of 0
                columns[column] += plain_column(counts / len(known)) if len(known) else [None] * BINS
    if not kinds:
        return None
    panels = [
        Panel(
            Axis("share of the kind", "percent", zero=True),
            [Series("matched", "matched", colour=kind), Series("null", "random directions", colour="all")],
            kind,
            {"kind": kind},
        )
        for kind in kinds
    ]
    return FigureTable(
        "matched_cosines",
        STABILITY,
        "Cosines of matched features",
        "ours",
        f"This run's features, present at the last snapshot, matched one to one with {_names(results)} so that the sum "
        "of cosines of the decoders there is the largest; each point counts what is within 0.05, and what has no match "
        "counts as 0. Dashed: the nearest of as many random directions with the same second moments, which need not be "
        f"one to one.{_restriction(results)}",
        columns,
        Lines(panels, x="cosine", x_axis=COSINE, split="run"),
        wide=True,
    )


def matched_share(results: Results) -> FigureTable | None:
    """Share of features with a match of at least a cosine."""
    columns: dict[str, Column] = {name: [] for name in ("run", "cosine", "matched", "nearest", "null")}
    for name, found in results.comparisons.items():
        nearest = np.sort(found["matching.nearest"][np.isfinite(found["matching.nearest"])])
        if len(nearest):
            columns["run"] += [name] * len(found["bars"])
            columns["cosine"] += plain_column(found["bars"])
            columns["matched"] += plain_column(found["share_at"])
            columns["nearest"] += plain_column(1 - np.searchsorted(nearest, found["bars"]) / len(nearest))
            columns["null"] += plain_column(found["share_at_null"])
    if not columns["run"]:
        return None
    series = [
        Series("matched", "matched one to one"),
        Series("nearest", "nearest"),
        Series("null", "random directions"),
    ]
    return FigureTable(
        "matched_share",
        STABILITY,
        "Share matched by threshold",
        "ours",
        "Share of the smaller dictionary with a match of at least that cosine; of this run's features the share whose "
        f"nearest is that near, one to one or not, and whose nearest random direction is. {STABLE:g} is what the "
        "sentences here call the same feature.",
        columns,
        Lines(
            [Panel(Axis("share of features", "percent", domain=(0, 1)), series)],
            x="cosine",
            x_axis=Axis("cosine of at least"),
            split="run",
        ),
    )


def matched_by_emergence(results: Results) -> FigureTable | None:
    """Share of features with a stable match by the snapshot of their emergence."""
    emergence = results.get("life", "cycles.emergence")
    if emergence is None or not results.comparisons:
        return None
    K = len(results.steps)
    columns: dict[str, Column] = {name: [] for name in ("run", "snapshot", "step", "features", "matched", "null")}
    for name, found in results.comparisons.items():
        members = np.isfinite(found["matching.nearest"]) & (emergence[0] >= 0)
        columns["run"] += [name] * K
        for column, values in results.by_snapshot.items():
            columns[column] += values
        columns["features"] += plain_column(np.bincount(emergence[0][members], minlength=K))
        for column, cosines_F in (("matched", "matching.cosine"), ("null", "nearest_null")):
            known = members & np.isfinite(found[cosines_F])
            counts_K = np.bincount(emergence[0][known], minlength=K)
            stable_K = np.bincount(emergence[0][known & (found[cosines_F] >= STABLE)], minlength=K)
            share_K = np.divide(stable_K, counts_K, out=np.full(K, np.nan), where=counts_K > 0)
            columns[column] += plain_column(share_K)
    return FigureTable(
        "matched_by_emergence",
        STABILITY,
        "Stable features by emergence",
        "ours",
        "Of this run's features that emerge at a snapshot and are present at the last, the share with a match of "
        f"cosine {STABLE:g} or more there; dashed, with a random direction that near.",
        columns,
        Lines(
            [
                Panel(
                    Axis("share of features", "percent", domain=(0, 1)),
                    [Series("matched", "matched"), Series("null", "random directions")],
                )
            ],
            split="run",
        ),
    )


def matched_emergence(results: Results) -> FigureTable | None:
    """When the matches of the features that emerge at a snapshot emerge."""
    shown = {name: found for name, found in results.comparisons.items() if found["emergence_pairs"].any()}
    if not shown:
        return None
    K = len(results.steps)
    row, other = np.divmod(np.arange(K * K), K)
    steps = np.asarray(results.steps)
    columns: dict[str, Column] = {
        "snapshot": plain_column(row),
        "step": plain_column(steps[row]),
        "other_snapshot": plain_column(other),
        "other_step": plain_column(steps[other]),
    }
    for name, found in shown.items():
        pairs_KK = found["emergence_pairs"]
        of_K1 = pairs_KK.sum(axis=1, keepdims=True)
        share_KK = np.divide(pairs_KK, of_K1, out=np.full((K, K), np.nan), where=of_K1 > 0)
        # a run may have any name, that of another column too
        columns[f"share, {name}"] = plain_column(share_KK.ravel())
        columns[f"pairs, {name}"] = plain_column(pairs_KK.ravel())
    return FigureTable(
        "matched_emergence",
        STABILITY,
        "Emergence of matched pairs",
        "ours",
        f"Pairs of cosine {STABLE:g} or more: of those whose feature in this run emerges at the one step (upwards), "
        "the share whose match in the other run emerges at the other (to the right). On the diagonal both emerge "
        "together.",
        columns,
        Heat(
            "other_snapshot",
            "snapshot",
            "emergence in the other run (training step)",
            "emergence in this run",
            [Measure(f"share, {name}", f"share, {name}", (0, 1)) for name in shown],
            [f"pairs, {name}" for name in shown],
            square=True,
        ),
    )


def _compared_kinds(results: Results, found: Arrays) -> Iterator[tuple[str, np.ndarray]]:
    """Kind -> (F,) its features that take part, where there are any."""
    for kind, mask in results.kinds.items():
        members = mask & np.isfinite(found["matching.nearest"])
        if members.any():
            yield kind, members


def _names(results: Results) -> str:
    return "those of " + ", ".join(results.comparisons)


def _restriction(results: Results) -> str:
    """What the caption says where not all pairs were candidates."""
    sentences = []
    for name, found in results.comparisons.items():
        n = int(found["matching.candidates"])
        if n:
            sentences.append(
                f" {name}: among the {n} nearest of cosine {FLOOR:g} or more, which costs at most "
                f"{float(found['matching.loss']):.2g} of cosine a feature."
            )
    return "".join(sentences)
