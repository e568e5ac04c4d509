"""What the evaluation of the crosscoder (`crosscoder train`, `crosscoder eval`) adds to the page.

Letters: K snapshots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscoder.activations.norms import HUGE
from crosscoder.errors import DataError
from crosscoder.figures.results import Fact, Part, Results
from crosscoder.figures.spec import Axis, Lines, Panel, Series
from crosscoder.figures.table import FigureTable, plain_column
from crosscoder.runs import Run
from crosscoder.sweep.figures import SECTION

NEEDED = {"train": {"dead_fraction", "n_train_tokens"}, "eval": {"explained_variance", "l0", "n_heldout_tokens"}}
"""The figures of `summary.json` that this rests on, by the verb that writes them."""


@dataclass(frozen=True)
class Evaluated:
    """How good the crosscoder is."""

    summary: Mapping[str, Any]
    """`summary.json`."""
    n_features: int
    n_snapshots: int
    d_model: int

    def curve(self, *names: str) -> np.ndarray:
        """(K,) a figure by snapshot."""
        found: Any = self.summary
        for name in names:
            found = found[name]
        return np.array(list(found.values()), dtype=np.float64)


def require(run: Run) -> Mapping[str, Any]:
    """The run's summary. Raises `DataError` with the remedy where a figure is missing."""
    summary = run.summary()
    for verb, figures in NEEDED.items():
        if not figures <= summary.keys():
            raise DataError(f"{run.path} lacks results; run first: crosscoder {verb} {run.path}")
    return summary


def explained_variance(found: Evaluated, results: Results) -> FigureTable | None:
    """Explained variance by snapshot, both definitions."""
    curves = {
        "mean of ratios": found.curve("explained_variance", "mean_of_ratios_by_snapshot"),
        "ratio of sums": found.curve("explained_variance", "by_snapshot"),
    }
    known = np.concatenate(list(curves.values()))
    low = float(np.nanmin(known)) if np.isfinite(known).any() else 0.0
    # the interesting part is near 1; a few bad snapshots must not squeeze the others
    axis = Axis("explained variance", domain=(max(-0.2, low - (1 - low) * 0.15), 1))
    return FigureTable(
        "explained_variance",
        "Explained variance",
        "both",
        "Held-out tokens, each snapshot on its own. Mean of ratios (the paper's): mean over tokens of 1 − "
        "|x − x̂|² / |x − mean|². Ratio of sums (ours): 1 − ΣSSE / ΣSST, which tokens of small norm do not "
        "dominate.",
        results.by_snapshot | {name: plain_column(curve_K) for name, curve_K in curves.items()},
        Lines([Panel(axis, [Series(name, name) for name in curves])]),
    )


def l0(found: Evaluated, results: Results) -> FigureTable | None:
    """Active features a token, by snapshot."""
    return FigureTable(
        "l0",
        "Active features a token (L0)",
        "paper",
        "Mean number of features active on a token at each snapshot, on held-out tokens.",
        results.by_snapshot | {"l0": plain_column(found.curve("l0", "by_snapshot"))},
        Lines([Panel(Axis("active features a token", zero=True), [Series("l0", "l0", colour="l0")])]),
    )


def quality(found: Evaluated, results: Results) -> str:
    """How much the crosscoder explains with how many features."""
    summary, by_snapshot = found.summary, found.curve("explained_variance", "by_snapshot")
    worst, best = np.nanmin(by_snapshot), np.nanmax(by_snapshot)
    return (
        f"The crosscoder explains {summary['explained_variance']['overall']:.1%} of the variance of the activations on "
        f"{summary['n_heldout_tokens']:,} held-out tokens ({worst:.1%} to {best:.1%} by snapshot) with "
        f"{summary['l0']['mean']:.1f} of its {found.n_features:,} features active a token and snapshot; "
        f"{summary['dead_fraction']:.1%} are dead."
    )


def facts(found: Evaluated, results: Results) -> list[Fact]:
    """Quality and size."""
    summary = found.summary
    heldout = f"on {summary['n_heldout_tokens']:,} tokens of held-out documents"
    ordinary = summary.get("explained_variance_by_norm", {}).get("ordinary")
    by_norm = [] if ordinary is None else [
        Fact("… of ordinary norms", f"{ordinary:.3f}", f"under {HUGE:g} median norms, around their own mean")
    ]  # fmt: skip
    return [
        Fact("Explained variance", f"{summary['explained_variance']['overall']:.3f}", f"1 − ΣSSE/ΣSST {heldout}"),
        *by_norm,
        Fact("L0", f"{summary['l0']['mean']:.1f}", "active features a token and snapshot, mean"),
        Fact("L0, union", f"{summary['l0']['union']:.1f}", "features active at one snapshot or more, a token"),
        Fact("Dead features", f"{summary['dead_fraction']:.1%}", "silent over the last tokens of training"),
        Fact("Features", f"{found.n_features:,}", "size of the dictionary, F"),
        Fact("Snapshots", f"{found.n_snapshots}", f"of width {found.d_model}"),
        Fact("Training tokens", f"{summary['n_train_tokens']:,}", "distinct tokens that the crosscoder trained on"),
    ]


PART = Part(Evaluated, SECTION, (explained_variance, l0), (quality,), facts)
