"""How good a crosscoder is: explained variance in both definitions, L0, firing, dead features.

Letters: B tokens, K snapshots, D width, F features. Source: docs/method.md, section 5; the paper's code reports the
mean over tokens of 1 - |x - x^|^2 / |x - mean|^2, which tokens of small norm dominate; ours is
1 - sum |x - x^|^2 / sum |x - mean|^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from crosscoder.code import SparseCode
from crosscoder.devices import sent
from crosscoder.errors import DataError
from crosscoder.kernels.batch import column_sums, squared_distances


def batch_explained_variance(x_BKD: Tensor, residual_BKD: Tensor) -> tuple[Tensor, Tensor]:
    """Both explained variances (K,) of one batch, around its own mean; NaN for a snapshot without variance."""
    if x_BKD.device.type == "cpu" and x_BKD.dtype == residual_BKD.dtype == torch.float32 and len(x_BKD):
        x_BKD = x_BKD.contiguous()
        mean_KD = column_sums(x_BKD.flatten(1)).view(x_BKD.shape[1:]) / len(x_BKD)
        total_BK = squared_distances(x_BKD, mean_KD)
        error_BK = squared_distances(residual_BKD.contiguous(), torch.zeros_like(mean_KD))
    else:
        mean_KD = x_BKD.mean(dim=0)
        total_BK = (x_BKD - mean_KD).square().sum(dim=2)
        error_BK = residual_BKD.square().sum(dim=2)
    tiny = torch.finfo(error_BK.dtype).tiny
    varies_K = total_BK.sum(dim=0) > NO_VARIANCE * len(x_BKD) * mean_KD.square().sum(dim=1)
    pooled_K = 1 - error_BK.sum(dim=0) / total_BK.sum(dim=0).clamp_min(tiny)
    ratio_K = (1 - error_BK / total_BK.clamp_min(tiny)).mean(dim=0)
    return torch.where(varies_K, pooled_K, math.nan), torch.where(varies_K, ratio_K, math.nan)


NO_VARIANCE = 1e-10
"""A snapshot whose squared deviation from its mean is at most this share of its squared norm is constant."""


@dataclass(frozen=True)
class NormBand:
    """Tokens (token and snapshot) whose norm is between two multiples of their snapshot's median norm."""

    low: float
    high: float | None
    n: int
    explained_variance: float | None
    """Around the band's own mean, over all snapshots; None without tokens or variance."""


@dataclass(frozen=True)
class Evaluation:
    """A crosscoder on held-out tokens."""

    n_tokens: int
    explained_variance: float
    """1 - sum |x - x^|^2 / sum |x - mean|^2, over the snapshots that have a variance."""
    explained_variance_K: list[float | None]
    """None for a snapshot without variance: there is nothing to explain."""
    explained_variance_mean_of_ratios_K: list[float | None]
    """The paper's definition, by snapshot."""
    deviation_K: list[float]
    """Sum of |x - mean|^2, by snapshot: the weight of each in the overall explained variance."""
    l0: float
    """Features on, a token and snapshot."""
    l0_K: list[float]
    l0_union: float
    """Features on at one snapshot or more, a token."""
    bands: list[NormBand]
    """The same by the tokens' norms, from small to huge; empty where the norms' medians were not given."""
    ordinary_explained_variance: float | None
    """Of the tokens that are not of a huge norm, around their own mean; None as `explained_variance` is."""
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

    def __init__(
        self, mean_KD: Tensor, n_features: int, median_K: Tensor | None = None, edges: Sequence[float] = (0.0,)
    ) -> None:
        """`median_K`: median norms; `edges`: multiples of them where bands begin, the last band that of huge norms.

        Sums are kept on the device of `mean_KD`, that of the batches, and read in the end.
        """
        K, D = mean_KD.shape
        zeros = partial(torch.zeros, dtype=torch.float64, device=mean_KD.device)
        counts = partial(torch.zeros, dtype=torch.int64, device=mean_KD.device)
        self._median_K = median_K
        self._edges = torch.tensor(edges)
        self._band_sums_3LK = zeros(3, len(edges), K)  # error, squares, tokens
        self._band_sum_LKD = zeros(len(edges), K, D)
        self._square_K = zeros(K)
        self._mean_KD = mean_KD
        self._n_tokens = 0
        self._sums_3K = zeros(3, K)  # squared error, squared deviation, ratio
        self._open_K = counts(K)
        self._fired_F = counts(n_features)

    def add(self, x_BKD: Tensor, reconstruction_BKD: Tensor, code: SparseCode) -> None:
        error_BK = (reconstruction_BKD - x_BKD).double().square().sum(dim=2)
        total_BK = (x_BKD - self._mean_KD).double().square().sum(dim=2)
        ratio_BK = 1 - error_BK / total_BK.clamp_min(1e-30)
        self._square_K += x_BKD.double().square().sum(dim=(0, 2))
        if self._median_K is not None:
            self._add_bands(x_BKD, error_BK, total_BK, self._median_K)
        self._sums_3K += torch.stack([error_BK.sum(0), total_BK.sum(0), ratio_BK.sum(0)])
        self._open_K += code.open_gates().sum(dim=0)
        self._fired_F += torch.bincount(code.features, minlength=len(self._fired_F))
        self._n_tokens += len(x_BKD)

    def _add_bands(self, x_BKD: Tensor, error_BK: Tensor, total_BK: Tensor, median_K: Tensor) -> None:
        ratio_BK = (x_BKD.norm(dim=2) / median_K.clamp_min(1e-30)).contiguous()
        band_BK = torch.bucketize(ratio_BK, sent(self._edges, ratio_BK.device), right=True) - 1
        for band in range(len(self._edges)):
            in_BK = (band_BK == band).double()
            self._band_sums_3LK[:, band] += torch.stack(
                [(error_BK * in_BK).sum(0), (total_BK * in_BK).sum(0), in_BK.sum(0)]
            )
            centred_BKD = (x_BKD - self._mean_KD).double()
            self._band_sum_LKD[band] += torch.einsum("bk,bkd->kd", in_BK, centred_BKD)

    def _explained(self, bands: slice) -> float | None:
        """Explained variance of the tokens of some bands, each snapshot around those tokens' own mean."""
        error_K, square_K, n_K = self._band_sums_3LK[:, bands].sum(dim=1)
        sum_KD = self._band_sum_LKD[bands].sum(dim=0)
        deviation = float((square_K - sum_KD.square().sum(dim=1) / n_K.clamp_min(1)).clamp_min(0).sum())
        return float(1 - error_K.sum() / deviation) if deviation > NO_VARIANCE * float(self._square_K.sum()) else None

    def _bands(self) -> list[NormBand]:
        edges = self._edges.tolist()
        return [
            NormBand(low, high, int(self._band_sums_3LK[2, band].sum()), self._explained(slice(band, band + 1)))
            for band, (low, high) in enumerate(zip(edges, [*edges[1:], None], strict=True))
        ]

    def result(self) -> Evaluation:
        """What was found. Raises `DataError` where no snapshot has a variance."""
        n, fired_F = max(1, self._n_tokens), self._fired_F.cpu()
        error_K, total_K, ratio_K = self._sums_3K.cpu()
        varies_K = total_K > NO_VARIANCE * self._square_K.cpu()
        if not bool(varies_K.any()):
            raise DataError("no snapshot has a variance: all tokens have the same activations; nothing to evaluate")
        explained_K = 1 - error_K / total_K.clamp_min(1e-300)
        with_bands = self._median_K is not None
        l0_K = self._open_K.cpu().double() / n
        return Evaluation(
            n_tokens=self._n_tokens,
            explained_variance=float(1 - error_K[varies_K].sum() / total_K[varies_K].sum()),
            explained_variance_K=_where(varies_K, explained_K),
            explained_variance_mean_of_ratios_K=_where(varies_K, ratio_K / n),
            deviation_K=total_K.tolist(),
            l0=float(l0_K.mean()),
            l0_K=l0_K.tolist(),
            l0_union=float(fired_F.sum() / n),
            bands=self._bands() if with_bands else [],
            ordinary_explained_variance=self._explained(slice(0, len(self._edges) - 1)) if with_bands else None,
            firing_rate_F=fired_F.double() / n,
        )


def _where(kept_K: Tensor, values_K: Tensor) -> list[float | None]:
    return [float(value) if kept else None for kept, value in zip(kept_K, values_K, strict=True)]
