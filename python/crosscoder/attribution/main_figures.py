"""The main figures of a task, as `summary.json` has them under `attribution.TASK`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from crosscoder.attribution.ablation import Curves
from crosscoder.attribution.circuits import Circuit
from crosscoder.attribution.gradients import METHODS
from crosscoder.attribution.snapshot import Attributed, SnapshotResult
from crosscoder.attribution.task import Task
from crosscoder.common.statistics import spearman
from crosscoder.config import AttributionSettings

TRUTH = {"gradient_x_activation": "zero", "attribution_patching": "resample", "integrated_gradients": "resample"}
"""Which exact ablation each method approximates."""
TOP = 50


def main_figures(
    task: Task, revisions: Sequence[str], parts: Sequence[SnapshotResult], found: Circuit, settings: AttributionSettings
) -> dict[str, Any]:
    """Figures of a task from its snapshots; None where the task is at chance at every snapshot.

    Shares and errors are means over the snapshots above chance.
    """
    known = [(name, one.attributed) for name, one in zip(revisions, parts, strict=True) if one.attributed is not None]
    main = settings.ablations[0]
    figures: dict[str, Any] = {
        "n_prompts": len(task),
        "clean_accuracy": _by(revisions, [float((one.metric > 0).mean()) for one in parts]),
        "logit_difference" if task.metric == "logit-difference" else "probability_difference": _by(
            revisions, [float(one.metric.mean()) for one in parts]
        ),
        "corrupted_metric": _by(revisions, [float(one.corrupted.mean()) for one in parts]),
        "explained_variance": _by(revisions, [one.explained_variance for one in parts]),
        "above_chance": [name for name, _ in known],
        **_curve_figures(known, main),
        "ig_completeness_error": _mean([part.completeness_error["integrated_gradients"] for _, part in known]),
        "ig_completeness_error_by_snapshot": {
            name: part.completeness_error["integrated_gradients"] for name, part in known
        },
        "rank_correlation_with_exact": {
            method: _mean([rank_correlation(part, method, task) for _, part in known]) for method in METHODS
        },
        "n_exact": settings.n_exact,
        "ablation": main,
        "by_ablation": {ablation: _curve_figures(known, ablation) for ablation in settings.ablations},
        "dominant_feature": {
            name: int(found.dominant[k]) for k, name in enumerate(revisions) if found.dominant[k] >= 0
        },
        "handovers": found.handovers,
    }
    return figures


def _curve_figures(known: Sequence[tuple[str, Attributed]], ablation: str) -> dict[str, Any]:
    """Drops by the top 50 and by matched random 50, and how many features reach 80 %, with one kind of ablation."""
    curves = {name: part.curves[ablation] for name, part in known}
    every = curves.values()
    return {
        f"disrupt_top{TOP}": _mean([drop(one, one.disrupt, TOP) for one in every]),
        f"disrupt_random{TOP}": _mean([drop(one, one.disrupt_random, TOP) for one in every]),
        "disrupt_equally_active": _mean([drop(one, one.disrupt_active, TOP) for one in every]),
        "active_a_token": {
            name: _mean([_active(one, column) for one in every])
            for column, name in enumerate((f"top{TOP}", f"random{TOP}", "equally_active"))
        },
        "k_for_80_percent": {name: one.enough if one.enough > 0 else None for name, one in curves.items()},
    }


def drop(curves: Curves, disrupted: np.ndarray, k: int) -> float:
    """Drop of the metric by ablating `k` features, as a share of the clean one; NaN where there are not as many.

    `disrupted`: (G, ...) one of the metrics of `curves`.
    """
    row = np.flatnonzero(curves.k == k)
    clean = curves.clean.mean()
    return float((clean - disrupted[row[0]].mean()) / clean) if len(row) else math.nan


def _active(curves: Curves, column: int) -> float:
    row = np.flatnonzero(curves.k == TOP)
    return float(curves.active[row[0], column]) if len(row) else math.nan


def rank_correlation(part: Attributed, method: str, task: Task) -> float:
    """Spearman's between a method's attributions and the exact effects, over the listed features; NaN under three."""
    listed = part.listed
    if len(listed) < 3:
        return math.nan
    n = int(max(part.feature.max(), listed.max())) + 1
    sums = np.bincount(part.feature, part.values[method], minlength=n)
    return spearman(sums[listed] / task.n_train, part.exact[TRUTH[method]])


def _by(revisions: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    return dict(zip(revisions, values, strict=True))


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else None
