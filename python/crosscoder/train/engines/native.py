"""The training step on a CPU: one reduced-precision product, then only what is active.

A step has so many pairs (token, feature) that it either goes the sparse way, or, above `DENSE_ABOVE`, the dense way: in
float32, feature tile by feature tile, with the same update. Which one depends on the batch and the weights alone, so
that the same run takes the same way every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.config import TrainConfig
from crosscoder.kernels.encode.rows import default_products
from crosscoder.kernels.update.native import AdamOptions, gradient_squares, update_dense_rows, update_rows
from crosscoder.kernels.update.reference import BETA1, BETA2, EPSILON
from crosscoder.model import Crosscoder
from crosscoder.native_model import SparsePass, rows_of, sparse_pass
from crosscoder.step import DensePass
from crosscoder.train.engines.base import StepSettings, StepStatistics
from crosscoder.train.engines.reference import (
    clip_factor,
    dense_statistics,
    tile_squares,
    update_vector,
    with_norm,
)
from crosscoder.train.state import AdamState

DENSE_ABOVE = 0.1
"""Density (share of all pairs of token and feature) above which the dense way is faster: docs/performance.md."""
DENSE_TILE = 1024


class NativeEngine:
    """Steps for `model`, with float32 or bfloat16 weights on the CPU."""

    name = "native"

    def __init__(self, model: Crosscoder, config: TrainConfig) -> None:
        self.state = AdamState(model, config.state)
        self._model = model
        self._config = config
        self._rows = rows_of(model, default_products())

    def parameters_changed(self) -> None:
        """Changes are noticed by the parameters' version counters."""

    @torch.no_grad()
    def step(self, x_BKD: Tensor, settings: StepSettings) -> StepStatistics:
        """Loss, gradients and update for one batch."""
        model = self._model
        x_BKD = model.check_input(x_BKD)
        self._rows = rows_of(model, self._rows.products)
        sparse = sparse_pass(
            model,
            x_BKD,
            self._rows,
            sparsity_coefficient=settings.sparsity_coefficient,
            preactivation_coefficient=settings.preactivation_coefficient,
            generator=torch.Generator().manual_seed(settings.seed),
            max_pairs=int(DENSE_ABOVE * len(x_BKD) * model.config.n_features),
        )
        if sparse is None:
            return self._dense_step(x_BKD, settings)
        return self._sparse_step(sparse, settings)

    def _sparse_step(self, sparse: SparsePass, settings: StepSettings) -> StepStatistics:
        model, parts = self._model, sparse.parts
        statistics = StepStatistics(
            sparse.loss, parts.residual_BKD, sparse.open_K, sparse.fired_F, sparse.smallest_score
        )
        if not bool(torch.isfinite(sparse.loss.total)):
            return statistics
        factor, norm = 1.0, None
        if self._config.clip_norm is not None:
            vectors = (parts.encoder_bias(), sparse.db_dec_KD, sparse.dlog_threshold_F)
            squares = gradient_squares(parts, model.W_dec).double().sum()
            norm = (squares + sum(float(vector.double().square().sum()) for vector in vectors)).sqrt()
            factor = clip_factor(norm, self._config.clip_norm)
        options = self._options(settings, factor)
        update_rows(parts, model.W_enc, model.W_dec, model.b_enc, self.state, self._rows, options)
        self._rows.written(model.W_enc, model.W_dec)
        update_vector(model, self.state, "b_dec", sparse.db_dec_KD * factor, settings)
        update_vector(model, self.state, "log_threshold", sparse.dlog_threshold_F * factor, settings)
        return with_norm(statistics, norm)

    def _dense_step(self, x_BKD: Tensor, settings: StepSettings) -> StepStatistics:
        model = self._model
        dense = DensePass(
            model,
            x_BKD,
            sparsity_coefficient=settings.sparsity_coefficient,
            preactivation_coefficient=settings.preactivation_coefficient,
            generator=torch.Generator().manual_seed(settings.seed),
            tile=DENSE_TILE,
        )
        statistics = dense_statistics(dense)
        if not bool(torch.isfinite(dense.loss.total)):
            return statistics
        factor, norm = 1.0, None
        if self._config.clip_norm is not None:
            squares = [tile_squares(gradients) for _, gradients in dense.gradients()]
            norm = (torch.stack(squares).sum() + dense.db_dec_KD.double().square().sum()).sqrt()
            factor = clip_factor(norm, self._config.clip_norm)
        options = self._options(settings, factor)
        all_touched = settings.preactivation_coefficient > 0
        for features, gradients in dense.gradients():
            touched = dense.fired_F[features] > 0
            update_dense_rows(
                gradients.W_enc,
                gradients.W_dec,
                gradients.b_enc,
                torch.ones_like(touched) if all_touched else touched,
                features.start,
                model.W_enc,
                model.W_dec,
                model.b_enc,
                self.state,
                self._rows,
                options,
            )
            update_vector(model, self.state, "log_threshold", gradients.log_threshold * factor, settings, features)
        self._rows.written(model.W_enc, model.W_dec)
        update_vector(model, self.state, "b_dec", dense.db_dec_KD * factor, settings)
        return with_norm(statistics, norm)

    def _options(self, settings: StepSettings, factor: float) -> AdamOptions:
        return AdamOptions(
            lr=settings.lr,
            betas=(BETA1, BETA2),
            epsilon=EPSILON,
            t=settings.number + 1,
            lazy=self._config.optimizer_mode == "lazy",
            gradient_factor=factor,
            norm_limit=self._config.decoder_norm_limit,
            seed=settings.seed,
        )
