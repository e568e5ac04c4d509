"""Ablating sets of features: how many carry a task, and how many suffice.

Letters: P prompts, R coded tokens, N pairs, D width, F features.

Of a ranking of the features, *disrupt* ablates the first k and keeps the others; *restore* keeps the first k and
ablates the others (both the paper's). As shares, with m(M) the clean metric and m(0) that with every feature ablated:
faithfulness of the first k is `(m(restore k) - m(0)) / (m(M) - m(0))`, and the completeness of what is left is
`(m(disrupt k) - m(0)) / (m(M) - m(0))` (of Marks et al. 2024). The drop is `(m(M) - m(ablated)) / m(M)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crosscoder.attribution.coding import length_batches
from crosscoder.attribution.splice import SnapshotPrompts, Splice
from crosscoder.attribution.task import Task
from crosscoder.config import Ablation, Errors

ENOUGH = 0.8
MOST_RANDOM = 1000
"""Features in the largest random set."""


def grid(n: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to and with `n`."""
    values = [digit * 10**power for power in range(len(str(n))) for digit in (1, 2, 5)]
    return [k for k in values if k < n] + [n] if n else []


class Ablator:
    """The metric of a task's prompts with any set of features ablated, at one snapshot."""

    def __init__(
        self,
        splice: Splice,
        clean: SnapshotPrompts,
        corrupted: SnapshotPrompts,
        task: Task,
        *,
        ablation: Ablation = "mean",
        errors: Errors = "kept",
    ) -> None:
        """An ablated feature takes its mean over the tokens of the task's train prompts ("mean"), 0 ("zero"), or what
        it is at the same place of the corrupted prompt ("resample"). `errors` "ablated" treats the error alike, in
        every run but the clean one."""
        self.splice, self.task, self.ablation, self.errors = splice, task, ablation, errors
        self.prompts = clean.take(task.test)
        self.other = corrupted.take(task.test)
        F = len(splice.W_FD)
        train = clean.take(task.train)
        n_tokens = max(1, int(train.coded_PT.sum()))
        self.mean_F = torch.bincount(train.pairs.features_N, train.pairs.values_N, minlength=F).float() / n_tokens
        self.error_RD = self._error_change(train) if errors == "ablated" else None
        batches = length_batches(self.prompts.last_P, torch.arange(len(self.prompts)))
        self._batches = [(index_B, self.prompts.take(index_B), self.other.take(index_B)) for index_B in batches]

    def _error_change(self, train: SnapshotPrompts) -> Tensor:
        error_RD = self.splice.error(self.prompts)
        if self.ablation == "mean":
            return self.splice.error(train).mean(dim=0) - error_RD
        if self.ablation == "resample":
            return self.splice.error(self.other) - error_RD
        return -error_RD

    @torch.no_grad()
    def metric(self, ablated_F: np.ndarray | None) -> np.ndarray:
        """(P,) metric of the test prompts with the features ablated where `ablated_F` (F,) is true; None: the clean
        metric, with the error kept."""
        out_P = torch.zeros(len(self.prompts))
        mask_F = None if ablated_F is None else torch.from_numpy(ablated_F)
        for index_B, batch, other in self._batches:
            if mask_F is None:
                logits = self.splice.logits(batch)
            else:
                delta_RD = self._delta(batch, other, mask_F)
                if self.error_RD is not None:
                    delta_RD = delta_RD + self.error_RD[self.prompts.rows_of(index_B)]
                logits = self.splice.shifted_logits(batch, delta_RD)
            out_P[index_B] = self.task.measure(logits, self.task.test[index_B])
        return out_P.double().numpy()

    def _delta(self, batch: SnapshotPrompts, other: SnapshotPrompts, mask_F: Tensor) -> Tensor:
        W_FD = self.splice.W_FD
        delta_RD = -batch.pairs.only(mask_F).decode(W_FD)
        if self.ablation == "mean":
            return delta_RD + (self.mean_F * mask_F) @ W_FD
        if self.ablation == "resample":
            return delta_RD + other.pairs.only(mask_F).decode(W_FD)
        return delta_RD


def matched_random(
    top: np.ndarray, rate_F: np.ndarray, norm_F: np.ndarray, rng: np.random.Generator, nearest: int = 5
) -> np.ndarray:
    """For each feature of `top` another one outside it, of like firing rate and norm, none twice.

    Distance is Euclidean in log rate and log norm, each in units of its spread; one of the `nearest` is drawn. Fewer
    than `top` where there are not as many others that fire. Definition ours.
    """
    outside = np.setdiff1d(np.flatnonzero((rate_F > 0) & (norm_F > 0)), top)
    tiny = np.finfo(np.float64).tiny
    place_F2 = np.log(np.stack([rate_F, norm_F], axis=1) + tiny)
    spread = place_F2[np.concatenate([outside, top])].std(axis=0) + 1e-9
    free = np.ones(len(outside), dtype=bool)
    chosen = []
    for feature in top.tolist():
        distance = (((place_F2[outside] - place_F2[feature]) / spread) ** 2).sum(axis=1)
        distance[~free] = np.inf
        count = min(nearest, int(free.sum()))
        if not count:
            break
        candidates = np.argpartition(distance, count - 1)[:count]
        pick = candidates[rng.integers(len(candidates))]
        free[pick] = False
        chosen.append(outside[pick])
    return np.array(chosen, dtype=np.int64)


def equally_active(top: np.ndarray, rate_F: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random features outside `top`, as many as are together as active as it; all others if these are not enough.

    The harder control where the top features fire more often than any others do. Definition ours.
    """
    outside = rng.permutation(np.setdiff1d(np.flatnonzero(rate_F > 0), top))
    reached = np.searchsorted(rate_F[outside].cumsum(), rate_F[top].sum() * (1 - 1e-9))
    return outside[: int(reached) + 1]


@dataclass(frozen=True)
class Curves:
    """The metric of every test prompt for nested sets of features, at one snapshot. G sizes of sets."""

    k: np.ndarray
    """(G,) sizes."""
    clean: np.ndarray
    """(P,) nothing ablated."""
    empty: np.ndarray
    """(P,) every feature ablated: m(0)."""
    disrupt: np.ndarray
    """(G, P) the first k ablated."""
    restore: np.ndarray
    """(G, P) all but the first k ablated."""
    disrupt_random: np.ndarray
    """(G, S, P) as many matched random features ablated, S sets; NaN where there are not as many."""
    disrupt_active: np.ndarray
    """(G, S, P) random features ablated that are together as active; NaN for large sets."""
    active: np.ndarray
    """(G, 3) active features a token in the first k, in the matched and in the equally active random sets."""
    restore_random: np.ndarray
    """(G, S, P) all but as many matched random features ablated."""
    enough: int
    """Smallest k with a faithfulness of 80 %, -1 if none has; between the sizes found by bisection."""


def curves(
    ablator: Ablator, ranking: np.ndarray, rate_F: np.ndarray, norm_F: np.ndarray, *, n_random: int, seed: int
) -> Curves:
    """Curves for `ranking`, the features in order of what they are held to do for the task, the strongest first."""
    F = len(rate_F)

    def mask(features: np.ndarray) -> np.ndarray:
        chosen_F = np.zeros(F, dtype=bool)
        chosen_F[features] = True
        return chosen_F

    sizes = grid(len(ranking))
    clean_P, empty_P = ablator.metric(None), ablator.metric(np.ones(F, dtype=bool))
    disrupt, restore = [], []
    random = np.full((3, len(sizes), n_random, len(clean_P)), np.nan)
    active = np.full((len(sizes), 3, n_random), np.nan)
    for row, k in enumerate(sizes):
        top_F = mask(ranking[:k])
        disrupt.append(ablator.metric(top_F))
        restore.append(ablator.metric(~top_F))
        active[row, 0] = rate_F[ranking[:k]].sum()
        for number in range(n_random if k <= MOST_RANDOM else 0):
            rng = np.random.default_rng([seed, k, number])
            others = equally_active(ranking[:k], rate_F, rng)
            random[2, row, number] = ablator.metric(mask(others))
            active[row, 2, number] = rate_F[others].sum()
            others = matched_random(ranking[:k], rate_F, norm_F, rng)
            if len(others) < k:
                continue
            random[0, row, number] = ablator.metric(mask(others))
            random[1, row, number] = ablator.metric(~mask(others))
            active[row, 1, number] = rate_F[others].sum()

    def faithfulness(restored_P: np.ndarray) -> float:
        return float((restored_P.mean() - empty_P.mean()) / (clean_P.mean() - empty_P.mean()))

    reached = [row for row, restored_P in enumerate(restore) if faithfulness(restored_P) >= ENOUGH]
    enough = -1
    if reached:
        enough = sizes[reached[0]]
        below = sizes[reached[0] - 1] if reached[0] else 0
        while enough - below > 1:
            middle = (enough + below) // 2
            if faithfulness(ablator.metric(~mask(ranking[:middle]))) >= ENOUGH:
                enough = middle
            else:
                below = middle
    return Curves(
        k=np.array(sizes),
        clean=clean_P,
        empty=empty_P,
        disrupt=np.array(disrupt),
        restore=np.array(restore),
        disrupt_random=random[0],
        disrupt_active=random[2],
        active=active.mean(axis=2),
        restore_random=random[1],
        enough=enough,
    )
