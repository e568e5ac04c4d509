"""Latent scaling: is a norm near 0 the absence of a feature, or an artefact of the sparsity penalty?

Letters: B tokens in a batch, K snapshots, D width, F features, N active (token, feature) pairs, U features active in a
batch.

After Minder et al. 2025 (sparsity artefacts in crosscoders): how strongly does a target y at snapshot k hold the
feature, by least squares of y_bk on f_b d,

    beta_k = sum_b f_b <d, y_bk> / (|d|^2 sum_b f_b^2),      nu_k = beta_k / beta_peak.

f_b is the feature's activation wherever it is active (at any snapshot), and d its decoder at the snapshot of its
largest norm. Two targets:

- *error*: what the crosscoder leaves out at k, plus the feature's own contribution, f_bk W_dec[f, k]. Large where the
  norm is near 0: the feature is there and the penalty has shrunk it away (complete shrinkage).
- *reconstruction*: all that the crosscoder puts there. Large where the norm is near 0: other features stand in for it
  (decoupling).

Ours: error and reconstruction are centred over the tokens (a constant is no sign of a feature, and f_b is never
negative); `own` replaces d by the decoder at k itself, brought to the length |d|, because a feature that has turned is
hard to see along d; the null takes another feature's direction, of length |d|; the bounds above which something is
suspicious. For an honest feature beta_error along its own direction is its relative norm.

Only active pairs are touched: for one snapshot, sum_b f_b y_bk is a sparse (U, B) times dense (B, D) product, from
which every direction's sum follows. N K D multiplications a target, memory O(F K).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from crosscoder.code import SparseCode
from crosscoder.errors import DataError
from crosscoder.evolution.checks import Decoders, checked_decoders, checked_mask, decoders_of, inverse

LOW_NORM = 0.1
"""Relative norms up to here are suspected."""
SHRUNK, DECOUPLED = 0.2, 0.5
"""nu of the error, and of the reconstruction, from which on a norm near 0 is called shrunk, or decoupled."""
PEAK, OWN, NULL = range(3)


@dataclass(frozen=True)
class LatentScaling:
    """Rows of features that never fired are NaN."""

    beta_error: NDArray[np.float32]
    """(F, K) along the decoder at the peak."""
    beta_reconstruction: NDArray[np.float32]
    """(F, K)"""
    beta_error_own: NDArray[np.float32]
    """(F, K) along the decoder at k; NaN where it is 0."""
    beta_reconstruction_own: NDArray[np.float32]
    """(F, K)"""
    beta_error_null: NDArray[np.float32]
    """(F, K) along another feature's decoder."""
    beta_reconstruction_null: NDArray[np.float32]
    """(F, K)"""
    nu_error: NDArray[np.float32]
    """(F, K) beta_error over its value at the peak; NaN where that is not positive."""
    nu_reconstruction: NDArray[np.float32]
    """(F, K) the same for beta_reconstruction."""
    peak: NDArray[np.int32]
    """(F,) index of the snapshot of the largest norm, the later of ties."""
    low: NDArray[np.bool_]
    """(F, K) relative norm of at most 0.1: the pairs in question, for features that fired."""
    shrunk: NDArray[np.bool_]
    """(F, K) `low`, and nu_error at least 0.2."""
    decoupled: NDArray[np.bool_]
    """(F, K) `low`, and nu_reconstruction at least 0.5."""
    share_shrunk: float
    """Share of the low pairs that are shrunk; NaN if there is none."""
    share_decoupled: float
    """Share of the low pairs that are decoupled."""
    share_shrunk_null: float
    """`share_shrunk` with another feature's direction (over the same beta at the peak)."""
    share_decoupled_null: float
    """`share_decoupled` likewise."""
    n_tokens: int
    """Tokens that all this is from."""


class ScalingSums:
    """Streaming sums: `add` batches of tokens, then `result`. How they are divided into batches does not matter."""

    def __init__(self, W_dec: Tensor, *, alive_F: ArrayLike | None = None, seed: int = 0) -> None:
        """For decoders (F, K, D), kept and not copied. The null's directions are drawn among `alive_F` (F,) bool."""
        n_features, n_snapshots, width = checked_decoders(W_dec)
        alive = checked_mask(alive_F, n_features)
        self._W_dec = W_dec.detach()
        self._dtype = torch.promote_types(W_dec.dtype, torch.float32)
        self.norms_FK = torch.linalg.vector_norm(self._W_dec, dim=2, dtype=self._dtype)
        self._inverse_FK = inverse(self.norms_FK)
        self.peak_F = n_snapshots - 1 - self.norms_FK.flip(1).argmax(dim=1)
        self._other_F = _others(np.flatnonzero(alive), n_features, seed).to(W_dec.device)
        self._n_tokens = 0
        zeros = partial(torch.zeros, dtype=torch.float64, device=W_dec.device)
        self._sum_F = zeros(n_features)  # of f
        self._square_F = zeros(n_features)  # of f^2
        self._open_FK = zeros(n_features, n_snapshots)  # of f^2 where the gate is open
        self._mean_K2D = zeros(n_snapshots, 2, width)  # sums of the targets
        self._dots_FK23 = zeros(n_features, n_snapshots, 2, 3)  # of f <direction, target>

    def add(self, code: SparseCode, error_BKD: Tensor, reconstruction_BKD: Tensor) -> None:
        """Count B tokens: their code, x - x^ and x^, in the unit of the decoders.

        Raises `DataError` for shapes that do not fit.
        """
        n_features, n_snapshots, width = self._W_dec.shape
        expected = (code.n_tokens, n_snapshots, width)
        if (code.n_features, error_BKD.shape, reconstruction_BKD.shape) != (n_features, expected, expected):
            raise DataError(
                f"a code of {code.n_tokens} tokens and {code.n_features} features with targets of shape "
                f"{tuple(error_BKD.shape)} and {tuple(reconstruction_BKD.shape)} does not fit decoders of shape "
                f"{tuple(self._W_dec.shape)}"
            )
        self._n_tokens += code.n_tokens
        features_N, order_N = code.features.long().sort(stable=True)
        counts_F = torch.bincount(features_N, minlength=n_features)
        ids_U = counts_F.nonzero()[:, 0]
        offsets = torch.cat([counts_F.new_zeros(1), counts_F[ids_U].cumsum(0)])
        value_N = code.values[order_N]
        square_N = value_N.double().square()
        self._sum_F.index_add_(0, features_N, value_N.double())
        self._square_F.index_add_(0, features_N, square_N)
        self._open_FK.index_add_(0, features_N, square_N[:, None] * code.open_gates()[order_N])

        row_N, value_N = code.rows()[order_N], value_N.to(self._dtype)
        at_peak_UD, other_UD = self._along_peak(ids_U), self._along_other(ids_U)
        for k in range(n_snapshots):
            target_B2D = torch.stack([error_BKD[:, k], reconstruction_BKD[:, k]], dim=1).to(self._dtype)
            self._mean_K2D[k] += target_B2D.double().sum(dim=0)
            if not len(ids_U):
                continue
            sum_U2D = _weighted_sums(row_N, value_N, offsets, target_B2D.flatten(1)).view(-1, 2, width)
            directions_UD3 = torch.stack([at_peak_UD, self._along_own(ids_U, k), other_UD], dim=2)
            self._dots_FK23[ids_U, k] += (sum_U2D @ directions_UD3).double()

    def result(self, *, chunk_features: int = 4096) -> LatentScaling:
        """beta and nu of all tokens so far. Raises `DataError` if there is none."""
        if not self._n_tokens:
            raise DataError("latent scaling needs tokens; there was none")
        n_features, n_snapshots, _ = self._W_dec.shape
        mean_K2D = self._mean_K2D / self._n_tokens
        beta_FK23 = torch.empty_like(self._dots_FK23)
        for ids_C in torch.split(torch.arange(n_features, device=self._W_dec.device), chunk_features):
            length_C = self.norms_FK[ids_C, self.peak_F[ids_C]].double()
            scale_C = (length_C.square() * self._square_F[ids_C]).reciprocal()
            for k in range(n_snapshots):
                along = [self._along_peak(ids_C), self._along_own(ids_C, k), self._along_other(ids_C)]
                directions_CD3 = torch.stack(along, dim=2).double()
                constant_C23 = mean_K2D[k] @ directions_CD3
                dots_C23 = self._dots_FK23[ids_C, k] - self._sum_F[ids_C, None, None] * constant_C23
                own_C13 = self._W_dec[ids_C, k].double()[:, None] @ directions_CD3
                dots_C23[:, 0] += own_C13[:, 0] * self._open_FK[ids_C, k, None]
                beta_FK23[ids_C, k] = torch.where(scale_C.isfinite(), scale_C, torch.nan)[:, None, None] * dots_C23
        beta_FK23[self.norms_FK == 0, :, OWN] = torch.nan
        return self._judged(beta_FK23.cpu().numpy())

    def _judged(self, beta_FK23: NDArray[np.float64]) -> LatentScaling:
        norms, peak = self.norms_FK.double().cpu().numpy(), self.peak_F.cpu().numpy()
        at_peak_F2 = beta_FK23[np.arange(len(peak)), peak, :, PEAK]
        at_peak_F12 = np.where(at_peak_F2 > 0, at_peak_F2, np.nan)[:, None, :]
        nu_FK2, null_FK2 = beta_FK23[..., PEAK] / at_peak_F12, beta_FK23[..., NULL] / at_peak_F12
        fired = (self._square_F > 0).cpu().numpy()
        largest = norms.max(axis=1, keepdims=True)
        low = (norms <= LOW_NORM * largest) & (largest > 0) & fired[:, None]
        bounds = (SHRUNK, DECOUPLED)
        shrunk, decoupled = (low & (nu_FK2[..., target] >= bound) for target, bound in enumerate(bounds))
        null = [low & (null_FK2[..., target] >= bound) for target, bound in enumerate(bounds)]
        total = int(low.sum())
        shares = [float(where.sum() / total) if total else float("nan") for where in (shrunk, decoupled, *null)]
        beta = beta_FK23.astype(np.float32)
        return LatentScaling(
            beta_error=beta[:, :, 0, PEAK],
            beta_reconstruction=beta[:, :, 1, PEAK],
            beta_error_own=beta[:, :, 0, OWN],
            beta_reconstruction_own=beta[:, :, 1, OWN],
            beta_error_null=beta[:, :, 0, NULL],
            beta_reconstruction_null=beta[:, :, 1, NULL],
            nu_error=nu_FK2[..., 0].astype(np.float32),
            nu_reconstruction=nu_FK2[..., 1].astype(np.float32),
            peak=peak.astype(np.int32),
            low=low,
            shrunk=shrunk,
            decoupled=decoupled,
            share_shrunk=shares[0],
            share_decoupled=shares[1],
            share_shrunk_null=shares[2],
            share_decoupled_null=shares[3],
            n_tokens=self._n_tokens,
        )

    def _along_peak(self, ids: Tensor) -> Tensor:
        return self._W_dec[ids, self.peak_F[ids]].to(self._dtype)

    def _along_own(self, ids: Tensor, k: int) -> Tensor:
        length = self.norms_FK[ids, self.peak_F[ids]]
        own_UD: Tensor = self._W_dec[ids, k].to(self._dtype) * (length * self._inverse_FK[ids, k])[:, None]
        return own_UD

    def _along_other(self, ids: Tensor) -> Tensor:
        other, length = self._other_F[ids], self.norms_FK[ids, self.peak_F[ids]]
        factor = length * self._inverse_FK[other, self.peak_F[other]]
        other_UD: Tensor = self._along_peak(other) * factor[:, None]
        return other_UD


def _weighted_sums(row_N: Tensor, value_N: Tensor, offsets: Tensor, x_BE: Tensor) -> Tensor:
    """(U, E): sum of value * x[row] over the pairs of each of U groups, which lie one after the other."""
    if x_BE.device.type == "cuda":  # in the order of the pairs, which cuSPARSE does not promise
        return embedding_bag(row_N, x_BE, offsets, mode="sum", per_sample_weights=value_N, include_last_offset=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        size = (len(offsets) - 1, len(x_BE))
        matrix_UB = torch.sparse_csr_tensor(offsets, row_N, value_N, size, check_invariants=False)
    return matrix_UB @ x_BE


def latent_scaling(
    batches: Iterable[tuple[SparseCode, Tensor, Tensor]], W_dec: Decoders, **options: Any
) -> LatentScaling:
    """beta and nu from (code, x - x^, x^) batches; options as for `ScalingSums`."""
    sums = ScalingSums(decoders_of(W_dec), **options)
    for batch in batches:
        sums.add(*batch)
    return sums.result()


def _others(alive: NDArray[np.int64], n_features: int, seed: int) -> Tensor:
    """(F,) for each feature another one that is alive (itself, if there is no other)."""
    rng = np.random.default_rng(seed)
    other = rng.choice(alive, n_features) if len(alive) else np.arange(n_features)
    order = rng.permutation(alive)
    other[order] = np.roll(order, 1)
    return torch.from_numpy(other)
