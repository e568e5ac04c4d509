"""How good a crosscoder is: explained variance in both definitions, L0, firing, dead features.

Letters: B tokens, K snapshots, D width, F features. Source: docs/method.md, section 5; the paper's code reports the
mean over tokens of 1 - |x - x^|^2 / |x - mean|^2, which tokens of small norm dominate; ours is
1 - sum |x - x^|^2 / sum |x - mean|^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosscoder.code import SparseCode
from crosscoder.kernels.batch import column_sums, squared_distances


def batch_explained_variance(x_BKD: Tensor, residual_BKD: Tensor) -> tuple[Tensor, Tensor]:
    """Both explained variances (K,) of one batch, around the batch's own mean."""
    if x_BKD.device.type == "cpu" and x_BKD.dtype == residual_BKD.dtype == torch.float32 and len(x_BKD):
        x_BKD = x_BKD.contiguous()
        mean_KD = column_sums(x_BKD.flatten(1)).view(x_BKD.shape[1:]) / len(x_BKD)
        total_BK = squared_distances(x_BKD, mean_KD)
        error_BK = squared_distances(residual_BKD.contiguous(), torch.zeros_like(mean_KD))
    else:
        total_BK = (x_BKD - x_BKD.mean(dim=0)).square().sum(dim=2)
        error_BK = residual_BKD.square().sum(dim=2)
    tiny = torch.finfo(error_BK.dtype).tiny
    pooled_K = 1 - error_BK.sum(dim=0) / total_BK.sum(dim=0).clamp_min(tiny)
    return pooled_K, (1 - error_BK / total_BK.clamp_min(tiny)).mean(dim=0)


@dataclass(frozen=True)
class Evaluation:
    """A crosscoder on held-out tokens."""

    n_tokens: int
    explained_variance: float
    """1 - sum |x - x^|^2 / sum |x - mean|^2, over all snapshots."""
    explained_variance_K: list[float]
    explained_variance_mean_of_ratios_K: list[float]
    """The paper's definition, by snapshot."""
    deviation_K: list[float]
    """Sum of |x - mean|^2, by snapshot: the weight of each in the overall explained variance."""
    l0: float
    """Features on, a token and snapshot."""
    l0_K: list[float]
    l0_union: float
    """Features on at one snapshot or more, a token."""
    firing_rate_F: Tensor
    """(F,): share of the tokens on which each feature is on at one snapshot or more."""

    @property
    def never_fired_fraction(self) -> float:
        """Share of the features that fire on no token of this batch."""
        return float((self.firing_rate_F == 0).double().mean())


class Evaluator:
    """Streaming evaluation: `add` batches, then `result`. Sums are kept in float64.

    `mean_KD` is the mean activation, in the same (scaled) units as the batches.
    """

    def __init__(self, mean_KD: Tensor, n_features: int) -> None:
        K = len(mean_KD)
        self._mean_KD = mean_KD
        self._n_tokens = 0
        self._sums_3K = torch.zeros(3, K, dtype=torch.float64)  # squared error, squared deviation, ratio
        self._open_K = torch.zeros(K, dtype=torch.int64)
        self._fired_F = torch.zeros(n_features, dtype=torch.int64)

    def add(self, x_BKD: Tensor, reconstruction_BKD: Tensor, code: SparseCode) -> None:
        error_BK = (reconstruction_BKD - x_BKD).double().square().sum(dim=2)
        total_BK = (x_BKD - self._mean_KD).double().square().sum(dim=2)
        ratio_BK = 1 - error_BK / total_BK.clamp_min(1e-30)
        self._sums_3K += torch.stack([error_BK.sum(0), total_BK.sum(0), ratio_BK.sum(0)]).cpu()
        self._open_K += code.open_gates().sum(dim=0).cpu()
        self._fired_F += torch.bincount(code.features, minlength=len(self._fired_F)).cpu()
        self._n_tokens += len(x_BKD)

    def result(self) -> Evaluation:
        n = max(1, self._n_tokens)
        error_K, total_K, ratio_K = self._sums_3K
        l0_K = self._open_K.double() / n
        return Evaluation(
            n_tokens=self._n_tokens,
            explained_variance=float(1 - error_K.sum() / total_K.sum()),
            explained_variance_K=(1 - error_K / total_K).tolist(),
            explained_variance_mean_of_ratios_K=(ratio_K / n).tolist(),
            deviation_K=total_K.tolist(),
            l0=float(l0_K.mean()),
            l0_K=l0_K.tolist(),
            l0_union=float(self._fired_F.sum() / n),
            firing_rate_F=self._fired_F.double() / n,
        )
