"""Figures of whether a norm says how separable a feature is: linear probes and latent scaling.

Letters: n probed features, K snapshots.
"""

from __future__ import annotations

import numpy as np

from crosscoder.figures.spec import Axis, Bars, Field, Lines, Listing, Panel, Scatter, Series
from crosscoder.figures.table import MOST_POINTS, Column, FigureTable, plain_column
from crosscoder.report.results import SHOWN_KINDS, Results
from crosscoder.report.sections import HONESTY


def separability(results: Results) -> FigureTable | None:
    """AUC of a probe against the relative norm, a point a feature and snapshot."""
    found = results.get("probes", "features", "relative", "areas.auc", "honesty.correlation_overall")
    kinds = results.kinds
    if found is None or not kinds:
        return None
    features_n, relative_nK, auc_nK, correlation = found
    pairs = np.argwhere(np.isfinite(auc_nK))
    if not pairs.size:
        return None
    n_pairs = len(pairs)
    if n_pairs > MOST_POINTS:
        pairs = pairs[np.sort(np.random.default_rng(0).choice(n_pairs, MOST_POINTS, replace=False))]
    row, k = pairs.T
    kind = np.full(len(results.arrays["life"]["cycles.kind"]), "", dtype=object)
    for name, mask in kinds.items():
        kind[mask] = name
    columns: dict[str, Column] = {
        "feature": plain_column(features_n[row]),
        "kind": list(kind[features_n[row]]),
        "step": plain_column(results.steps[k]),
        "relative norm": plain_column(relative_nK[row, k]),
        "AUC": plain_column(auc_nK[row, k]),
    }
    return FigureTable(
        "separability",
        HONESTY,
        "Separability against the norm",
        "ours",
        "A point is a feature at a snapshot: how well a linear probe of that snapshot's activations tells, on held-out "
        "tokens, that the feature is active (AUC; 0.5 is chance), against the decoder norm there over the feature's "
        f"maximum. {len(row):,} of {n_pairs:,} pairs of {len(features_n):,} probed features are drawn. Rank "
        f"correlation over all pairs {float(correlation):.2f}. The paper claims that the two go together.",
        columns,
        Scatter(
            "relative norm",
            Axis("relative norm", domain=(0, 1)),
            "AUC",
            Axis("AUC"),
            "kind",
            [name for name in SHOWN_KINDS if name in kinds],
            ["step"],
        ),
    )


def separability_by_norm(results: Results) -> FigureTable | None:
    """Mean AUC in bins of the relative norm, beside that without the snapshot's own part in the label."""
    names = ("bins", "bin_auc", "bin_auc_without", "bin_count")
    found = results.get("probes", *(f"honesty.{name}" for name in names))
    nulls = results.get("probes", "areas.shuffled", "areas.random")
    if found is None or nulls is None:
        return None
    edges, auc, without, count = found
    columns: dict[str, Column] = {
        "relative norm": plain_column((edges[:-1] + edges[1:]) / 2),
        "AUC": plain_column(auc),
        "without": plain_column(without),
        "pairs": plain_column(count),
    }
    rules = {
        name: float(np.nanmean(area))
        for name, area in zip(("labels of other tokens", "random direction"), nulls, strict=True)
        if np.isfinite(area).any()
    }
    return FigureTable(
        "separability_by_norm",
        HONESTY,
        "Mean separability by norm",
        "ours",
        "Mean AUC of the pairs in each range of the relative norm, weighted to the whole dictionary; once with labels "
        "that the probed snapshot had no part in. Dashed: probes of the labels of other tokens, and random directions.",
        columns,
        Lines(
            [
                Panel(
                    Axis("mean AUC"),
                    [Series("AUC", "AUC"), Series("without", "labels without this snapshot")],
                    rules=rules,
                )
            ],
            x="relative norm",
            x_axis=Axis("relative norm", domain=(0, 1)),
        ),
    )


def disagreements(results: Results) -> FigureTable | None:
    """The features and snapshots where norm and probe disagree."""
    found = results.get("probes", "features", "relative", "areas.auc", "honesty.hidden", "honesty.hollow")
    if found is None:
        return None
    features_n, relative_nK, auc_nK, hidden, hollow = found
    pairs = np.concatenate([hidden.reshape(-1, 2), hollow.reshape(-1, 2)]).astype(np.int64)
    if not len(pairs):
        return None
    row = np.array([np.flatnonzero(features_n == feature)[0] for feature in pairs[:, 0]])
    columns: dict[str, Column] = {
        "feature": plain_column(pairs[:, 0]),
        "what": ["hidden"] * len(hidden) + ["hollow"] * len(hollow),
        "step": plain_column(results.steps[pairs[:, 1]]),
        "relative norm": plain_column(relative_nK[row, pairs[:, 1]]),
        "AUC": plain_column(auc_nK[row, pairs[:, 1]]),
    }
    return FigureTable(
        "disagreements",
        HONESTY,
        "Where norm and separability disagree",
        "ours",
        "Hidden: hardly a norm (at most 0.1 of the maximum), yet separable (AUC of 0.9 or more, also by labels without "
        "the snapshot). Hollow: at least half of the norm, yet an AUC under 0.7. Click one to open its feature.",
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


def latent_scaling(results: Results) -> FigureTable | None:
    """By snapshot: features whose norm near 0 is an artefact of the penalty."""
    found = results.get("latent_scaling", "low", "shrunk", "decoupled")
    if found is None:
        return None
    low_K, shrunk_K, decoupled_K = (flags.sum(axis=0) for flags in found)
    columns = results.by_snapshot
    columns.update(
        {"shrunk": plain_column(shrunk_K), "decoupled": plain_column(decoupled_K), "low": plain_column(low_K)}
    )
    return FigureTable(
        "latent_scaling",
        HONESTY,
        "Norms near 0 that are artefacts",
        "ours",
        "Features with a relative norm of at most 0.1 at a snapshot that are there all the same, by latent scaling "
        "(Minder et al. 2025). Shrunk: what the crosscoder leaves out holds the feature (ν of the error at least 0.2). "
        f"Decoupled: other features stand in for it (ν of the reconstruction at least 0.5). Of {int(low_K.sum()):,} "
        "such pairs of a feature and a snapshot in all. The two can overlap.",
        columns,
        Bars(
            "snapshot",
            "snapshot (training step)",
            Axis("features", "count"),
            [Series("shrunk", "shrunk"), Series("decoupled", "decoupled")],
        ),
    )
