"""Weight gradients feature by feature on a CPU, and Adam on each row at once: no (F, K, D) gradient exists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from crosscoder import _core
from crosscoder.code import SparseCode
from crosscoder.kernels.arrays import array, arrays, code_arrays, n_threads
from crosscoder.kernels.encode.rows import EncoderRows
from crosscoder.kernels.transpose.native import order_arrays
from crosscoder.kernels.transpose.reference import FeatureOrder


class Moments(Protocol):
    """Adam's moments by parameter, and when each feature's were last brought up to date (`AdamState`)."""

    last_step_F: Tensor

    def __getitem__(self, name: str) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class GradientParts:
    """What the gradients of W_enc and W_dec are made of.

    dW_enc[f] = sum over pairs of dh x_b, dW_dec[f, k] = sum of f_b,f,k g_b,k + dnorm_f,k W_dec[f, k] / n_f,k. With
    l_pre also `every_F` times the sum of all tokens less that of the pairs at or above their threshold.
    """

    code: SparseCode
    order: FeatureOrder
    dh_N: Tensor
    x_BKD: Tensor
    residual_BKD: Tensor
    residual_scale: float
    dnorm_FK: Tensor
    norms_FK: Tensor
    theta_F: Tensor
    every_F: Tensor | None = None
    x_sum_KD: Tensor | None = None

    def arguments(self) -> tuple[Any, Any, Any]:
        """As the core takes them: code, order, and what is multiplied."""
        batch = arrays(self.dh_N, self.x_BKD, self.residual_BKD)
        of_features = arrays(self.dnorm_FK, self.norms_FK, self.every_F, self.x_sum_KD, self.theta_F)
        return code_arrays(self.code), order_arrays(self.order), (*batch, self.residual_scale, *of_features)

    def encoder_bias(self) -> Tensor:
        """db_enc (F,) = the sum of a feature's dh over all tokens."""
        dh_N, pairs = self.dh_N, self.code
        if self.every_F is not None:
            every_N = self.every_F[pairs.features.long()]
            above_N = pairs.values >= self.theta_F[pairs.features.long()]
            dh_N = dh_N - torch.where(above_N, every_N, 0.0)
        db_F = torch.zeros(pairs.n_features, dtype=torch.float32)
        db_F.index_add_(0, pairs.features.long(), dh_N)
        return db_F if self.every_F is None else db_F + self.every_F * pairs.n_tokens


def gradient_squares(parts: GradientParts, W_dec_FKD: Tensor) -> Tensor:
    """(F,): squared norm of each feature's rows of dW_enc and dW_dec together."""
    return torch.from_numpy(_core.gradient_squares(*parts.arguments(), array(W_dec_FKD), n_threads()))


def gradient_rows(parts: GradientParts, W_dec_FKD: Tensor) -> tuple[Tensor, Tensor]:
    """dW_enc and dW_dec (F, K, D) themselves, for optimisers that want them."""
    dW_enc_FKD, dW_dec_FKD = (
        torch.empty(W_dec_FKD.shape, dtype=torch.float32),
        torch.empty(W_dec_FKD.shape, dtype=torch.float32),
    )
    _core.gradient_rows(*parts.arguments(), *arrays(W_dec_FKD, dW_enc_FKD, dW_dec_FKD), n_threads())
    return dW_enc_FKD, dW_dec_FKD


@dataclass(frozen=True)
class AdamOptions:
    """One Adam step on the rows."""

    lr: float
    betas: tuple[float, float]
    epsilon: float
    t: int
    """Adam's step, from 1."""
    lazy: bool
    """Rows without a gradient are left alone; their moments decay when they are next touched."""
    gradient_factor: float = 1.0
    """The gradient is multiplied by this: clipping."""
    norm_limit: float | None = None
    """A feature's largest decoder norm may not be larger afterwards."""
    seed: int = 0
    """Of stochastic rounding, 32 bits."""

    def arguments(self) -> tuple[Any, ...]:
        """As the core takes them."""
        clipping = (self.gradient_factor, self.norm_limit or 0.0)
        return self.lr, *self.betas, self.epsilon, self.t, self.lazy, *clipping, self.seed & 0xFFFFFFFF


def _matrix(parameter: Tensor, moments: dict[str, Tensor]) -> tuple[Any, ...]:
    return arrays(parameter, moments["m"], moments["v"], moments.get("m_scale"), moments.get("v_scale"))


def _targets(
    W_enc_FKD: Tensor, W_dec_FKD: Tensor, b_enc_F: Tensor, state: Moments, rows: EncoderRows, options: AdamOptions
) -> tuple[Any, ...]:
    return (
        _matrix(W_enc_FKD, state["W_enc"]),
        _matrix(W_dec_FKD, state["W_dec"]),
        _matrix(b_enc_F, state["b_enc"]),
        array(state.last_step_F),
        rows.arrays(),
        options.arguments(),
        n_threads(),
    )


def update_rows(
    parts: GradientParts,
    db_enc_F: Tensor,
    W_enc_FKD: Tensor,
    W_dec_FKD: Tensor,
    b_enc_F: Tensor,
    state: Moments,
    rows: EncoderRows,
    options: AdamOptions,
) -> None:
    """Adam on W_enc, W_dec and b_enc in place, from the pairs; `rows` stay up to date."""
    targets = _targets(W_enc_FKD, W_dec_FKD, b_enc_F, state, rows, options)
    _core.update_rows(*parts.arguments(), array(db_enc_F), *targets)


def update_dense_rows(
    dW_enc_nKD: Tensor,
    dW_dec_nKD: Tensor,
    db_enc_n: Tensor,
    touched_n: Tensor,
    first: int,
    W_enc_FKD: Tensor,
    W_dec_FKD: Tensor,
    b_enc_F: Tensor,
    state: Moments,
    rows: EncoderRows,
    options: AdamOptions,
) -> None:
    """The same with given gradients of n features from `first` on; `touched_n` bool: which have any."""
    targets = _targets(W_enc_FKD, W_dec_FKD, b_enc_F, state, rows, options)
    gradients = arrays(dW_enc_nKD, dW_dec_nKD, db_enc_n, touched_n.to(torch.uint8))
    _core.update_dense_rows(*gradients, first, *targets)
