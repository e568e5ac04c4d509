"""Attribution of the metric to features: every feature at once, by the vector-Jacobian product at the layer.

x is linear in the features and the error, so the gradient of the metric in a feature is `<dm/dx, W_dec[f]>`: one
backward pass through the upper half of the model gives all of them (docs/attribution.md). Letters: P prompts, R coded
tokens, N pairs, D width, F features.

- gradient x activation (the paper's): `f dm/df` on the clean prompt: what is lost, to first order, if f were 0;
- attribution patching (the paper's): `(f - f') dm/df`, f' on the corrupted prompt: what is lost if f were f';
- integrated gradients (the paper's, its quadrature ours): the same with dm/df averaged over the straight path from x'
  to x; features and error move together. The sum over features and error is m(x) - m(x') but for the quadrature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crosscoder.attribution.coding import length_batches
from crosscoder.attribution.splice import SnapshotPrompts, Splice
from crosscoder.attribution.task import Task

METHODS = ("gradient_x_activation", "attribution_patching", "integrated_gradients")


@dataclass(frozen=True)
class PromptAttributions:
    """Attributions by prompt and feature, summed over the tokens; only features active on the prompt. M rows."""

    prompt: np.ndarray
    """(M,) index of the prompt in the task."""
    feature: np.ndarray
    """(M,)"""
    values: dict[str, np.ndarray]
    """(M,) for each of `METHODS`."""
    error: dict[str, np.ndarray]
    """(P,) what goes to the error, by method."""
    clean: np.ndarray
    """(P,) metric on the clean prompts."""
    corrupted: np.ndarray
    """(P,) metric on the corrupted prompts, of the same answers."""
    prompts: np.ndarray
    """(P,) index in the task of each prompt of `error`, `clean` and `corrupted`."""

    def mean(self, method: str, n_features: int) -> np.ndarray:
        """(F,) mean over the prompts, 0 where a feature is not active."""
        sums = np.bincount(self.feature, self.values[method], minlength=n_features)
        return np.asarray(sums / len(self.prompts))

    def completeness_error(self, method: str = "integrated_gradients") -> float:
        """Mean over prompts of |sum of attributions - (m(x) - m(x'))|, as a share of the mean of |m(x) - m(x')|."""
        place = {prompt: row for row, prompt in enumerate(self.prompts.tolist())}
        rows = np.array([place[prompt] for prompt in self.prompt.tolist()], dtype=np.int64)
        total = np.bincount(rows, self.values[method], minlength=len(self.prompts)) + self.error[method]
        difference = self.clean - self.corrupted
        return float(np.abs(total - difference).sum() / np.abs(difference).sum())


def midpoints(steps: int) -> np.ndarray:
    """Where the gradient is taken on the path from 0 (corrupted) to 1 (clean): the middle of each of `steps` parts."""
    return (np.arange(steps) + 0.5) / steps


def attribute(
    splice: Splice,
    clean: SnapshotPrompts,
    corrupted: SnapshotPrompts,
    task: Task,
    index_P: Tensor,
    *,
    steps: int = 10,
    on_batch: Callable[[int], object] = lambda n: None,
) -> PromptAttributions:
    """All methods on the prompts `index_P` of the task, at one snapshot. `steps` are those of integrated gradients."""
    parts = []
    for index_B in length_batches(task.last_P, index_P):
        parts.append(_batch(splice, clean.take(index_B), corrupted.take(index_B), task, index_B, steps))
        on_batch(len(index_B))
    return PromptAttributions(
        np.concatenate([part.prompt for part in parts]),
        np.concatenate([part.feature for part in parts]),
        {name: np.concatenate([part.values[name] for part in parts]) for name in METHODS},
        {name: np.concatenate([part.error[name] for part in parts]) for name in METHODS},
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("clean", "corrupted", "prompts")),
    )


def gradient(
    splice: Splice, prompts: SnapshotPrompts, x_PTD: Tensor, task: Task, index_P: Tensor
) -> tuple[Tensor, Tensor]:
    """The metric (P,) of prompts with x in the place of theirs, and its gradient in x, (P, T, D) float32."""
    x_PTD = x_PTD.detach().float().requires_grad_()
    with torch.enable_grad():
        metric_P = task.measure(splice.model.logits(prompts.ids_PT, x_PTD, prompts.last_P), index_P)
        (g_PTD,) = torch.autograd.grad(metric_P.sum(), x_PTD)
    return metric_P.detach(), g_PTD


def _batch(
    splice: Splice, clean: SnapshotPrompts, corrupted: SnapshotPrompts, task: Task, index_B: Tensor, steps: int
) -> PromptAttributions:
    x, x_other = clean.x_PTD.float(), corrupted.x_PTD.float()
    metric_B, g_clean = gradient(splice, clean, x, task, index_B)
    metric_other_B, _ = gradient(splice, corrupted, x_other, task, index_B)
    g_path = torch.zeros_like(g_clean)
    for alpha in midpoints(steps).tolist():
        # On the clean prompt's tokens: the upper half sees them nowhere, only their number.
        g_path += gradient(splice, clean, x_other + alpha * (x - x_other), task, index_B)[1] / steps

    code, code_other = clean.pairs, corrupted.pairs
    rows_N = torch.cat([code.rows(), code_other.rows()])
    feature_N = torch.cat([code.features_N, code_other.features_N])
    signed_N = torch.cat([code.values_N, -code_other.values_N])
    n_clean = len(code.values_N)

    def products(g_PTD: Tensor) -> Tensor:
        g_RD = g_PTD[clean.coded_PT]
        return torch.cat([pairs.products(g_RD, splice.W_FD) for pairs in (code, code_other)])

    at_clean_N, on_path_N = products(g_clean), products(g_path)
    by_pair = {
        "gradient_x_activation": torch.where(torch.arange(len(rows_N)) < n_clean, signed_N * at_clean_N, 0.0),
        "attribution_patching": signed_N * at_clean_N,
        "integrated_gradients": signed_N * on_path_N,
    }
    moved = {
        "gradient_x_activation": (g_clean, x),
        "attribution_patching": (g_clean, x - x_other),
        "integrated_gradients": (g_path, x - x_other),
    }
    prompt_N = clean.prompt_of_rows()[rows_N]
    key_M, place_N = torch.unique(prompt_N * len(splice.W_FD) + feature_N, return_inverse=True)
    values = {
        name: torch.zeros(len(key_M), dtype=torch.float64).index_add_(0, place_N, pair_N.double()).numpy()
        for name, pair_N in by_pair.items()
    }
    prompt_M = (key_M // len(splice.W_FD)).numpy()
    error = {}
    for name, (g_PTD, step_PTD) in moved.items():
        total_P = (g_PTD.double() * step_PTD.double()).sum(dim=(1, 2)).numpy()
        error[name] = total_P - np.bincount(prompt_M, values[name], minlength=len(index_B))
    return PromptAttributions(
        index_B.numpy()[prompt_M],
        (key_M % len(splice.W_FD)).numpy(),
        values,
        error,
        metric_B.double().numpy(),
        metric_other_B.double().numpy(),
        index_B.numpy(),
    )
