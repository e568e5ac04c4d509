"""Exact effect of one feature at a time: the ground truth of the attributions, for a short list of features.

Letters: P prompts, R coded tokens, n features of the list, D width, F features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from crosscoder.attribution.coding import length_batches
from crosscoder.attribution.splice import Pairs, SnapshotPrompts, Splice
from crosscoder.attribution.task import Task


def columns(pairs: Pairs, features_n: Tensor, n_features: int) -> Tensor:
    """(R, n): the values of the features `features_n` at every coded token."""
    place_F = torch.full((n_features,), -1)
    place_F[features_n] = torch.arange(len(features_n))
    column_N = place_F[pairs.features_N]
    listed = column_N >= 0
    dense_Rn = torch.zeros(len(pairs.offsets_R) - 1, len(features_n))
    dense_Rn[pairs.rows()[listed], column_N[listed]] = pairs.values_N[listed]
    return dense_Rn


@torch.no_grad()
def exact_effects(
    splice: Splice,
    clean: SnapshotPrompts,
    other: Pairs | None,
    task: Task,
    index_P: Tensor,
    features: np.ndarray,
    *,
    on_batch: Callable[[int], object] = lambda n: None,
) -> np.ndarray:
    """(n,) mean over the prompts `index_P` of m(x) - m(x with the feature changed), the error and all others kept.

    The feature becomes what it is in `other`, the code of the corrupted prompts, or 0 if that is None. `clean` and
    `other` are of the whole task. Prompts where that changes nothing are not run: their effect is 0.
    """
    features_n, F = torch.from_numpy(features).long(), len(splice.W_FD)
    rows = clean.rows_of(index_P)
    change_Rn = -columns(clean.pairs.take(rows), features_n, F)
    if other is not None:
        change_Rn += columns(other.take(rows), features_n, F)
    prompts = clean.take(index_P)
    prompt_R = prompts.prompt_of_rows()
    changed_Pn = torch.zeros(len(index_P), len(features)).index_add_(0, prompt_R, (change_Rn != 0).float()) > 0
    metric_P = torch.zeros(len(index_P))
    for index_B in length_batches(prompts.last_P, torch.arange(len(index_P))):
        batch = prompts.take(index_B)
        metric_P[index_B] = task.measure(splice.logits(batch), index_P[index_B])
    prompt_M, column_M = changed_Pn.nonzero(as_tuple=True)
    effect_n = torch.zeros(len(features), dtype=torch.float64)
    for chosen in length_batches(prompts.last_P[prompt_M], torch.arange(len(prompt_M))):
        index_B, column_B = prompt_M[chosen], column_M[chosen]
        batch = prompts.take(index_B)
        of_row = batch.prompt_of_rows()
        change_R = change_Rn[prompts.rows_of(index_B), column_B[of_row]]
        delta_RD = change_R[:, None] * splice.W_FD[features_n[column_B]][of_row]
        changed_B = task.measure(splice.shifted_logits(batch, delta_RD), index_P[index_B])
        effect_n.index_add_(0, column_B, (metric_P[index_B] - changed_B).double())
        on_batch(len(chosen))
    return (effect_n / len(index_P)).numpy()
