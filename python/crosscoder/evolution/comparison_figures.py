"""What comparisons with other runs (`crosscoder compare`) add to the page.

Letters: F features of this run, K snapshots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from crosscoder.evolution.analyses.life import LifeResult, shown_kinds
from crosscoder.evolution.matching import FLOOR
from crosscoder.evolution.stability import STABLE, Stability
from crosscoder.figures.results import Part, Results
from crosscoder.figures.spec import Axis, Heat, Lines, Measure, Panel, Series
from crosscoder.figures.table import BINS, Column, FigureTable, histogram, plain_column

COSINE = Axis("cosine", domain=(0, 1))


@dataclass(frozen=True)
class Comparisons:
    """What comparing this run with others found."""

    by_run: Mapping[str, Stability]
    """Name of the other run -> this one's dictionary matched with its."""


def _compared_kinds(results: Results, found: Stability) -> Iterator[tuple[str, np.ndarray]]:
    """Kind -> (F,) its features that take part, where there are any."""
    for kind, mask in shown_kinds(results).items():
        members = mask & np.isfinite(found.matching.nearest)
        if members.any():
            yield kind, members


def matched_cosines(compared: Comparisons, results: Results) -> FigureTable | None:
    """Histograms of the matched cosines by kind, beside the nearest random direction's."""
    columns: dict[str, Column] = {name: [] for name in ("run", "kind", "cosine", "features", "matched", "null")}
    kinds: dict[str, None] = {}
    for name, found in compared.by_run.items():
        for kind, members in _compared_kinds(results, found):
            kinds[kind] = None
            columns["run"] += [name] * BINS
            columns["kind"] += [kind] * BINS
            columns["cosine"] += plain_column(histogram([])[0])
            columns["features"] += [int(members.sum())] * BINS
            for column, cosines_F in (("matched", found.matching.cosine), ("null", found.nearest_null)):
                counts = histogram(cosines_F[members])[1]
                # the null is a sample: a kind that it has no feature of has no null, not one of 0
                columns[column] += plain_column(counts / counts.sum()) if counts.any() else [None] * BINS
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
        "Cosines of matched features",
        "ours",
        f"This run's features, present at the last snapshot, matched one to one with those of "
        f"{', '.join(compared.by_run)} so that the sum of cosines of the decoders there is the largest; each point "
        f"counts what is within {1 / BINS:g}, and what has no match counts as 0. Dashed: the nearest of as many random "
        f"directions with the same second moments, which need not be one to one.{_restriction(compared)}",
        columns,
        Lines(panels, x="cosine", x_axis=COSINE, split="run"),
        wide=True,
    )


def _restriction(compared: Comparisons) -> str:
    """What the caption says where not all pairs were candidates."""
    return "".join(
        f" {name}: among the {found.matching.candidates} nearest of cosine {FLOOR:g} or more, which costs at most "
        f"{found.matching.loss:.2g} of cosine a feature."
        for name, found in compared.by_run.items()
        if found.matching.candidates
    )


def matched_share(compared: Comparisons, results: Results) -> FigureTable | None:
    """Share of features with a match of at least a cosine."""
    columns: dict[str, Column] = {name: [] for name in ("run", "cosine", "matched", "nearest", "null")}
    for name, found in compared.by_run.items():
        nearest = np.sort(found.matching.nearest[np.isfinite(found.matching.nearest)])
        if len(nearest):
            columns["run"] += [name] * len(found.bars)
            columns["cosine"] += plain_column(found.bars)
            columns["matched"] += plain_column(found.share_at)
            columns["nearest"] += plain_column(1 - np.searchsorted(nearest, found.bars) / len(nearest))
            columns["null"] += plain_column(found.share_at_null)
    if not columns["run"]:
        return None
    series = [
        Series("matched", "matched one to one"),
        Series("nearest", "nearest"),
        Series("null", "random directions"),
    ]
    return FigureTable(
        "matched_share",
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


def matched_by_emergence(compared: Comparisons, results: Results) -> FigureTable | None:
    """Share of features with a stable match by the snapshot of their emergence."""
    life = results.of(LifeResult)
    if life is None or not compared.by_run:
        return None
    K, emergence_F = len(results.steps), life.cycles.emergence
    columns: dict[str, Column] = {name: [] for name in ("run", "snapshot", "step", "features", "matched", "null")}
    for name, found in compared.by_run.items():
        members = np.isfinite(found.matching.nearest) & (emergence_F >= 0)
        columns["run"] += [name] * K
        for column, values in results.by_snapshot.items():
            columns[column] += values
        columns["features"] += plain_column(np.bincount(emergence_F[members], minlength=K))
        for column, cosines_F in (("matched", found.matching.cosine), ("null", found.nearest_null)):
            known = members & np.isfinite(cosines_F)
            counts_K = np.bincount(emergence_F[known], minlength=K)
            stable_K = np.bincount(emergence_F[known & (cosines_F >= STABLE)], minlength=K)
            share_K = np.divide(stable_K, counts_K, out=np.full(K, np.nan), where=counts_K > 0)
            columns[column] += plain_column(share_K)
    series = [Series("matched", "matched"), Series("null", "random directions")]
    return FigureTable(
        "matched_by_emergence",
        "Stable features by emergence",
        "ours",
        "Of this run's features that emerge at a snapshot and are present at the last, the share with a match of "
        f"cosine {STABLE:g} or more there; dashed, with a random direction that near.",
        columns,
        Lines([Panel(Axis("share of features", "percent", domain=(0, 1)), series)], split="run"),
    )


def matched_emergence(compared: Comparisons, results: Results) -> FigureTable | None:
    """When the matches of the features that emerge at a snapshot emerge."""
    shown = {name: found.emergence_pairs for name, found in compared.by_run.items() if found.emergence_pairs.any()}
    if not shown:
        return None
    K = len(results.steps)
    row, other = np.divmod(np.arange(K * K), K)
    columns: dict[str, Column] = {
        "snapshot": plain_column(row),
        "step": plain_column(results.steps[row]),
        "other_snapshot": plain_column(other),
        "other_step": plain_column(results.steps[other]),
    }
    for name, pairs_KK in shown.items():
        of_K1 = pairs_KK.sum(axis=1, keepdims=True)
        share_KK = np.divide(pairs_KK, of_K1, out=np.full((K, K), np.nan), where=of_K1 > 0)
        # a run may have any name, that of another column too
        columns[f"share, {name}"] = plain_column(share_KK.ravel())
        columns[f"pairs, {name}"] = plain_column(pairs_KK.ravel())
    return FigureTable(
        "matched_emergence",
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


def sentences(compared: Comparisons, results: Results) -> Iterator[str]:
    """One a comparison."""
    return (_stability(results, name, found) for name, found in compared.by_run.items())


def _stability(results: Results, name: str, found: Stability) -> str:
    """How much of the dictionary another run has too, and whether what is matched emerges at the same time."""
    if not np.isfinite(found.share_stable):
        return f"Nothing is compared with {name}: no features are present at the last snapshot of both."
    sentence = (
        f"Of {min(found.n_first, found.n_second):,} features that are present at the last snapshot, "
        f"{found.share_stable:.0%} have a match of cosine {STABLE:g} or more in {name} (random directions: "
        f"{found.share_stable_null:.0%})"
    )
    shares = [
        f"{np.mean(found.matching.cosine[members] >= STABLE):.0%} of the {kind} ones"
        for kind, members in _compared_kinds(results, found)
    ]
    if len(shares) > 1:
        sentence += f": {' and '.join(shares)}"
    if np.isfinite(found.emergence_same_emerging):
        sentence += (
            f"; of the {found.n_pairs_emerging:,} such pairs that emerge in training, "
            f"{found.emergence_same_emerging:.0%} do so at the same snapshot and "
            f"{found.emergence_within_one_emerging:.0%} at most one apart (pairs permuted: "
            f"{found.emergence_same_emerging_null:.0%} and {found.emergence_within_one_emerging_null:.0%})"
        )
    return f"{sentence}."


PART = Part(
    Comparisons,
    "Stability across runs",
    (matched_cosines, matched_share, matched_by_emergence, matched_emergence),
    (sentences,),
)
