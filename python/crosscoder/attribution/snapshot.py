"""What is measured of a task at one snapshot, as plain arrays: the unit of work that a killed study keeps.

Letters: P prompts, F features, M (prompt, feature) rows, n features of the exact list, G sizes of sets, S random sets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from crosscoder.attribution.ablation import Ablator, curves
from crosscoder.attribution.chance import above_chance
from crosscoder.attribution.coding import CodedTask, length_batches
from crosscoder.attribution.exact import exact_effects
from crosscoder.attribution.gradients import METHODS, attribute
from crosscoder.attribution.splice import CutModel, SnapshotPrompts, Splice
from crosscoder.config import AttributionSettings
from crosscoder.model import Crosscoder


def measure_snapshot(
    model: Any,
    k: int,
    layer: int,
    coded: CodedTask,
    crosscoder: Crosscoder,
    settings: AttributionSettings,
    on_stage: Callable[[str], object] = lambda stage: None,
) -> dict[str, np.ndarray]:
    """Everything of snapshot k: the metric of all prompts, and where the task is above chance the attributions on the
    train prompts, exact effects of the strongest features, and ablation curves on the test prompts.

    `crosscoder` is the one for raw activations.
    """
    task = coded.task
    clean, corrupted = coded.at(k, "clean"), coded.at(k, "corrupted")
    splice = Splice(CutModel(model, layer), crosscoder.W_dec[:, k], crosscoder.b_dec[k])
    on_stage("metric")
    metric_P = _metric(splice, clean, coded)
    arrays: dict[str, np.ndarray] = {
        "metric": metric_P,
        "corrupted": _metric(splice, corrupted, coded),
        "above_chance": np.array(above_chance(metric_P)),
        "explained_variance": np.array(_explained(splice, clean)),
    }
    if not arrays["above_chance"]:
        return arrays

    on_stage("attribution")
    F = crosscoder.config.n_features
    found = attribute(splice, clean, corrupted, task, task.train, steps=settings.steps)
    mean = {name: found.mean(name, F) for name in METHODS}
    arrays |= {
        "attribution.prompt": found.prompt.astype(np.int32),
        "attribution.feature": found.feature.astype(np.int32),
    }
    for name in METHODS:
        arrays[f"attribution.{name}"] = found.values[name].astype(np.float32)
        arrays[f"attribution.error.{name}"] = found.error[name]
        arrays[f"completeness_error.{name}"] = np.array(found.completeness_error(name))
    del arrays["completeness_error.gradient_x_activation"]  # it is about 0, not about the corrupted prompt

    on_stage("exact effects")
    integrated_F = mean["integrated_gradients"]
    order = np.argsort(-np.abs(integrated_F), kind="stable")
    listed = order[: min(settings.n_exact, int((integrated_F != 0).sum()))]
    arrays["exact.feature"] = listed.astype(np.int32)
    for name, other in (("resample", corrupted.pairs), ("zero", None)):
        arrays[f"exact.{name}"] = exact_effects(splice, clean, other, task, task.train, listed)

    train = clean.take(task.train)
    n_tokens = max(1, int(train.coded_PT.sum()))
    counts_F = torch.bincount(train.pairs.features_N, minlength=F).double()
    sums_F = torch.bincount(train.pairs.features_N, train.pairs.values_N.double(), minlength=F)
    strength_F = torch.linalg.vector_norm(splice.W_FD, dim=1).double() * sums_F / counts_F.clamp(min=1)
    order = np.argsort(-integrated_F, kind="stable")
    ranking = order[integrated_F[order] != 0]
    rate_F = (counts_F / n_tokens).numpy()
    for ablation in settings.ablations:
        on_stage(f"{ablation} ablation")
        ablator = Ablator(splice, clean, corrupted, task, ablation=ablation, errors=settings.errors)
        curve = curves(ablator, ranking, rate_F, strength_F.numpy(), n_random=settings.n_random, seed=settings.seed)
        for field in dataclasses.fields(curve):
            arrays[f"curves.{ablation}.{field.name}"] = np.asarray(getattr(curve, field.name))
    arrays["firing_rate"] = rate_F.astype(np.float32)
    return arrays


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
