"""Figures and sentence of whether a norm says how separable a feature is.

Letters: n probed features, K snapshots.
"""

from __future__ import annotations

import numpy as np

from crosscoder.evolution.analyses.life import LifeResult
from crosscoder.evolution.analyses.probes.compute import ProbesResult
from crosscoder.evolution.probes import HIGH_AUC, HIGH_NORM, LOW_AUC, LOW_NORM
from crosscoder.figures.results import Results
from crosscoder.figures.spec import Axis, Field, Lines, Listing, Panel, Scatter, Series
from crosscoder.figures.table import Column, FigureTable, drawn, plain_column


def separability(probes: ProbesResult, results: Results) -> FigureTable | None:
    """AUC of a probe against the relative norm, a point a feature and snapshot."""
    life, pairs = results.of(LifeResult), np.argwhere(np.isfinite(probes.areas.auc))
    if life is None or not life.shown_kinds() or not pairs.size:
        return None
    n_pairs = len(pairs)
    row, k = pairs[drawn(np.arange(n_pairs))[0]].T
    features = probes.features[row]
    columns: dict[str, Column] = {
        "feature": plain_column(features),
        "kind": list(life.kind_of_features()[features]),
        "step": plain_column(results.steps[k]),
        "relative norm": plain_column(probes.relative[row, k]),
        "AUC": plain_column(probes.areas.auc[row, k]),
    }
    return FigureTable(
        "separability",
        "Separability against the norm",
        "ours",
        "A point is a feature at a snapshot: how well a linear probe of that snapshot's activations tells, on held-out "
        "tokens, that the feature is active (AUC; 0.5 is chance), against the decoder norm there over the feature's "
        f"maximum. {len(row):,} of {n_pairs:,} pairs of {len(probes.features):,} probed features are drawn. Rank "
        f"correlation over all pairs {probes.honesty.correlation_overall:.2f}. The paper claims that the two go "
        "together.",
        columns,
        Scatter(
            "relative norm",
            Axis("relative norm", domain=(0, 1)),
            "AUC",
            Axis("AUC"),
            "kind",
            list(life.shown_kinds()),
            ["step"],
        ),
    )


def separability_by_norm(probes: ProbesResult, results: Results) -> FigureTable | None:
    """Mean AUC in bins of the relative norm, beside that without the snapshot's own part in the label."""
    honesty = probes.honesty
    columns: dict[str, Column] = {
        "relative norm": plain_column((honesty.bins[:-1] + honesty.bins[1:]) / 2),
        "AUC": plain_column(honesty.bin_auc),
        "without": plain_column(honesty.bin_auc_without),
        "pairs": plain_column(honesty.bin_count),
    }
    nulls = {"labels of other tokens": probes.areas.shuffled, "random direction": probes.areas.random}
    rules = {name: float(np.nanmean(area_nK)) for name, area_nK in nulls.items() if np.isfinite(area_nK).any()}
    series = [Series("AUC", "AUC"), Series("without", "labels without this snapshot")]
    return FigureTable(
        "separability_by_norm",
        "Mean separability by norm",
        "ours",
        "Mean AUC of the pairs in each range of the relative norm, weighted to the whole dictionary; once with labels "
        "that the probed snapshot had no part in. Dashed: probes of the labels of other tokens, and random directions.",
        columns,
        Lines(
            [Panel(Axis("mean AUC"), series, rules=rules)],
            x="relative norm",
            x_axis=Axis("relative norm", domain=(0, 1)),
        ),
    )


def disagreements(probes: ProbesResult, results: Results) -> FigureTable | None:
    """The features and snapshots where norm and probe disagree."""
    hidden, hollow = probes.honesty.hidden, probes.honesty.hollow
    pairs = np.concatenate([hidden.reshape(-1, 2), hollow.reshape(-1, 2)]).astype(np.int64)
    if not len(pairs):
        return None
    row = np.array([np.flatnonzero(probes.features == feature)[0] for feature in pairs[:, 0]])
    columns: dict[str, Column] = {
        "feature": plain_column(pairs[:, 0]),
        "what": ["hidden"] * len(hidden) + ["hollow"] * len(hollow),
        "step": plain_column(results.steps[pairs[:, 1]]),
        "relative norm": plain_column(probes.relative[row, pairs[:, 1]]),
        "AUC": plain_column(probes.areas.auc[row, pairs[:, 1]]),
    }
    return FigureTable(
        "disagreements",
        "Where norm and separability disagree",
        "ours",
        f"Hidden: hardly a norm (at most {LOW_NORM:g} of the maximum), yet separable (AUC of {HIGH_AUC:g} or more, "
        f"also by labels without the snapshot). Hollow: at least {HIGH_NORM:g} of the norm, yet an AUC under "
        f"{LOW_AUC:g}. Click one to open its feature.",
        columns,
        Listing(
            [
                Field("feature", "feature", "text"),
                Field("what", "what", "text"),
                Field("step", "at", "count", "step "),
                Field("relative norm", "norm"),
                Field("AUC", "AUC"),
            ],
            "AUC",
        ),
    )


def follows(probes: ProbesResult, results: Results) -> str:
    """Whether the norm follows separability."""
    if not np.isfinite(probes.honesty.correlation_median):
        return ""
    honesty = probes.honesty
    median, null = honesty.correlation_median, honesty.correlation_median_null
    verdict = "follows" if median - null > 0.2 else "hardly follows"
    shares = (
        (honesty.share_hidden, "norms near 0", "separable all the same"),
        (honesty.share_hollow, "high norms", "not separable"),
    )
    told = "".join(f"; {share:.1%} of the {what} are {how}" for share, what, how in shares if np.isfinite(share))
    return (
        f"The norm {verdict} how separable a feature is: over the snapshots of {len(probes.features):,} probed "
        f"features the rank correlation of AUC and norm has the median {median:.2f} ({null:.2f} with another "
        f"feature's norms){told}."
    )
