"""What is said of the lives of features: findings, and what a reader must know."""

from __future__ import annotations

import numpy as np

from crosscoder.evolution.analyses.life.compute import LifeResult
from crosscoder.evolution.analyses.life.figures import THRESHOLDS
from crosscoder.evolution.life_statistics import Compared
from crosscoder.evolution.strength import KIND_NAMES
from crosscoder.figures.results import Results

LONG = 0.6
"""Share of the snapshots at which a long-lived feature is present (the paper's)."""


def births(life: LifeResult, results: Results) -> str:
    """How many features emerge, when, and whether that is more than chance."""
    cycles, interval = life.cycles, life.interval
    told = {}
    for kind in ("initialization", "emergent"):
        low, high = (ends[KIND_NAMES.index(kind)] for ends in (interval.n_by_kind_low, interval.n_by_kind_high))
        told[kind] = f" ({interval.level:.0%} interval over features: {low:,.0f} to {high:,.0f})"
    counts = cycles.n_by_kind
    parts = [
        f"{counts['initialization']:,} features are there at step 0{told['initialization']} and "
        f"{counts['emergent']:,} emerge during training{told['emergent']}"
    ]
    null = life.null.emergent
    if np.isfinite(null.observed):
        parts[0] += f": {null.observed:.1%} of those alive, where {_shuffled(null)}"
        more = "more" if null.observed > null.null_mean else "fewer"
        parts.append(
            f"So {more} emerge than in a random order of the snapshots" if null.p <= 0.05 else
            "The number alone shows no more than chance: no difference from a random order of the snapshots is shown"
        )  # fmt: skip
    if cycles.births.sum():
        first, last = _middle(cycles.births)
        steps_K = results.steps
        parts.append(f"Half of them emerge from step {steps_K[first]:,} to step {steps_K[last]:,}, {_busiest(life)}")
        # Present from birth to the end, a feature reaches the share only if this much is left.
        able_F = (cycles.emergence > 0) & (len(steps_K) - cycles.emergence >= LONG * len(steps_K))
        if able_F.any():
            n, long = int(able_F.sum()), int((cycles.lifetime[able_F] >= LONG).sum())
            parts.append(f"Of the {n:,} born early enough to be present at {LONG:.0%} of the snapshots, {long:,} are")
    return "".join(f"{part}. " for part in parts).strip()


def _busiest(life: LifeResult) -> str:
    """The snapshot with the most births."""
    births_K, interval, null = life.cycles.births, life.interval, life.null.largest_births
    most = int(np.argmax(births_K))
    busiest = (
        f"most at step {life.cycles.steps[most]:,}: {births_K[most]:,} ({interval.births_low[most]:,.0f} to "
        f"{interval.births_high[most]:,.0f})"
    )
    if np.isfinite(null.observed):
        verdict = "more than" if null.p <= 0.05 else "not shown to be more than"
        busiest += (
            f", {null.observed:.1%} of those alive, {verdict} in random order (at the busiest snapshot "
            f"{_shuffled(null)})"
        )
    return busiest


def _shuffled(null: Compared) -> str:
    return (
        f"shuffled snapshots give {null.null_mean:.1%} (90 % of the shuffles {null.null_low:.1%} to "
        f"{null.null_high:.1%}; p = {null.p:.2g})"
    )


def _middle(counts_K: np.ndarray) -> tuple[int, int]:
    """Snapshots between which the middle half of the counts lies."""
    share_K = np.cumsum(counts_K) / counts_K.sum()
    return int(np.searchsorted(share_K, 0.25)), int(np.searchsorted(share_K, 0.75))


def order_of_snapshots(life: LifeResult, results: Results) -> str:
    """Whether there is more order in the lives than the same snapshots shuffled have."""
    null = life.null.contiguous
    if not np.isfinite(null.observed):
        return ""
    verdict = "more than" if null.p <= 0.05 else "not shown to be more than"
    return (
        f"{null.observed:.0%} of the features live without a gap, {verdict} where the snapshots are shuffled "
        f"({null.null_mean:.0%}, 90 % of the shuffles {null.null_low:.0%} to {null.null_high:.0%}; p = {null.p:.2g})."
    )


def threshold(life: LifeResult, results: Results) -> str:
    """What rests on the presence threshold."""
    return (
        f"Kinds, emergence and lifetime depend on the presence threshold τ = {life.cycles.threshold:g}, a choice of "
        f"ours; the figure “{THRESHOLDS}” shows others."
    )


def small_norms(life: LifeResult, results: Results) -> str:
    """What a small norm means."""
    return (
        "A decoder norm near 0 says that the crosscoder does not use a feature at a snapshot; the sparsity penalty can "
        "push norms to 0 where a weak version of the feature exists."
    )


SENTENCES = (births, order_of_snapshots)
NOTES = (threshold, small_norms)
