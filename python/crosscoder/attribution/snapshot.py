"""What is measured of a task at one snapshot: the unit of work that a killed study keeps.

Letters: P prompts, F features, M (prompt, feature) rows, n features of the exact list, G sizes of sets, S random sets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from crosscoder.attribution.ablation import Ablator, Curves, curves
from crosscoder.attribution.chance import above_chance
from crosscoder.attribution.coding import CodedTask, length_batches
from crosscoder.attribution.exact import exact_effects
from crosscoder.attribution.gradients import METHODS, attribute
from crosscoder.attribution.splice import CutModel, SnapshotPrompts, Splice
from crosscoder.attribution.task import Task
from crosscoder.config import AttributionSettings
from crosscoder.model import Crosscoder


@dataclass(frozen=True)
class Attributed:
    """What is measured where the task is above chance. Rows are features that are active on a train prompt."""

    prompt: np.ndarray
    """(M,)"""
    feature: np.ndarray
    """(M,)"""
    values: dict[str, np.ndarray]
    """Method -> (M,) attributions, summed over the tokens."""
    error: dict[str, np.ndarray]
    """Method -> (P,) what goes to the crosscoder's error."""
    completeness_error: dict[str, float]
    """Method -> share of the difference in the metric that its attributions leave out."""
    listed: np.ndarray
    """(n,) the features whose exact effect was measured, the strongest first."""
    exact: dict[str, np.ndarray]
    """What an ablated feature becomes -> (n,) mean effect of ablating each alone."""
    curves: dict[str, Curves]
    """Ablation -> curves over the test prompts."""
    firing_rate: np.ndarray
    """(F,) share of the train prompts' tokens."""


@dataclass(frozen=True)
class SnapshotResult:
    """A task at one snapshot."""

    metric: np.ndarray
    """(P,) of the clean prompts."""
    corrupted: np.ndarray
    """(P,) of the corrupted ones, for the same answers."""
    above_chance: bool
    explained_variance: float
    """Share of the variance of the clean prompts' activations that the features explain."""
    attributed: Attributed | None
    """None where the task is at chance."""


def measure_snapshot(
    model: Any,
    k: int,
    layer: int,
    coded: CodedTask,
    crosscoder: Crosscoder,
    settings: AttributionSettings,
    on_stage: Callable[[str], object] = lambda stage: None,
) -> SnapshotResult:
    """Everything of snapshot k: the metric of all prompts, and where the task is above chance the attributions on the
    train prompts, exact effects of the strongest features, and ablation curves on the test prompts.

    `model` computes on its device, the features' sums on the CPU: they are few. `crosscoder` is the one for raw
    activations.
    """
    task = coded.task
    clean, corrupted = coded.at(k, "clean"), coded.at(k, "corrupted")
    splice = Splice(CutModel(model, layer), crosscoder.W_dec[:, k].cpu(), crosscoder.b_dec[k].cpu())
    on_stage("metric")
    metric_P = _metric(splice, clean, coded)
    above = bool(above_chance(metric_P))
    return SnapshotResult(
        metric=metric_P,
        corrupted=_metric(splice, corrupted, coded),
        above_chance=above,
        explained_variance=_explained(splice, clean),
        attributed=_attributed(splice, clean, corrupted, task, crosscoder, settings, on_stage) if above else None,
    )


def _attributed(
    splice: Splice,
    clean: SnapshotPrompts,
    corrupted: SnapshotPrompts,
    task: Task,
    crosscoder: Crosscoder,
    settings: AttributionSettings,
    on_stage: Callable[[str], object],
) -> Attributed:
    on_stage("attribution")
    F = crosscoder.config.n_features
    found = attribute(splice, clean, corrupted, task, task.train, steps=settings.steps)
    mean = {name: found.mean(name, F) for name in METHODS}

    on_stage("exact effects")
    integrated_F = mean["integrated_gradients"]
    order = np.argsort(-np.abs(integrated_F), kind="stable")
    listed = order[: min(settings.n_exact, int((integrated_F != 0).sum()))]
    exact = {
        name: exact_effects(splice, clean, other, task, task.train, listed)
        for name, other in (("resample", corrupted.pairs), ("zero", None))
    }

    train = clean.take(task.train)
    n_tokens = max(1, int(train.coded_PT.sum()))
    counts_F = torch.bincount(train.pairs.features_N, minlength=F).double()
    sums_F = torch.bincount(train.pairs.features_N, train.pairs.values_N.double(), minlength=F)
    strength_F = torch.linalg.vector_norm(splice.W_FD, dim=1).double() * sums_F / counts_F.clamp(min=1)
    order = np.argsort(-integrated_F, kind="stable")
    ranking = order[integrated_F[order] != 0]
    rate_F = (counts_F / n_tokens).numpy()
    by_ablation: dict[str, Curves] = {}
    for ablation in settings.ablations:
        on_stage(f"{ablation} ablation")
        ablator = Ablator(splice, clean, corrupted, task, ablation=ablation, errors=settings.errors)
        by_ablation[ablation] = curves(
            ablator, ranking, rate_F, strength_F.numpy(), n_random=settings.n_random, seed=settings.seed
        )
    return Attributed(
        prompt=found.prompt.astype(np.int32),
        feature=found.feature.astype(np.int32),
        values={name: found.values[name].astype(np.float32) for name in METHODS},
        error=found.error,
        # that of gradient x activation is about 0, not about the corrupted prompt
        completeness_error={
            name: float(found.completeness_error(name)) for name in METHODS if name != "gradient_x_activation"
        },
        listed=listed.astype(np.int32),
        exact=exact,
        curves=by_ablation,
        firing_rate=rate_F.astype(np.float32),
    )


@torch.no_grad()
def _metric(splice: Splice, prompts: SnapshotPrompts, coded: CodedTask) -> np.ndarray:
    """(P,) metric of all prompts as they are, of the clean prompts' answers."""
    metric_P = torch.zeros(len(prompts))
    for index_B in length_batches(prompts.last_P, torch.arange(len(prompts))):
        metric_P[index_B] = coded.task.measure(splice.logits(prompts.take(index_B)), index_B)
    return metric_P.double().numpy()


def _explained(splice: Splice, prompts: SnapshotPrompts) -> float:
    """Share of the variance of x over the coded tokens that the features explain."""
    x_RD = prompts.coded(prompts.x_PTD)
    return 1 - float(splice.error(prompts).square().sum() / (x_RD - x_RD.mean(dim=0)).square().sum())
