"""The training step on a CPU: one reduced-precision product, then only what is active.

A step has so many pairs (token, feature) that it either goes the sparse way, or, above `DENSE_ABOVE`, the dense way: in
float32, feature tile by feature tile, with the same update. Which one depends on the batch and the weights alone, so
that the same run takes the same way every time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from crosscoder import _core
from crosscoder.code import SparseCode
from crosscoder.config import TrainConfig
from crosscoder.kernels.arrays import array
from crosscoder.kernels.encode.rows import EncoderRows, column_scale, default_products
from crosscoder.kernels.scratch import Scratch
from crosscoder.kernels.update.native import AdamOptions, gradient_squares, update_dense_rows, update_rows
from crosscoder.kernels.update.reference import BETA1, BETA2, EPSILON
from crosscoder.model import Crosscoder
from crosscoder.native_model import SparsePass, encode, rows_of, sparse_pass
from crosscoder.progress import warn
from crosscoder.train.engines.base import StepSettings, StepStatistics
from crosscoder.train.engines.recall import REQUIRED_RECALL, TOKENS, RecallAudit
from crosscoder.train.engines.reference import (
    clip_factor,
    dense_clipping,
    dense_pass,
    dense_statistics,
    update_vector,
    with_norm,
)
from crosscoder.train.state import AdamState

DENSE_ABOVE = 0.3
"""Density (share of all pairs of token and feature) above which the dense way is faster: docs/performance.md."""
DENSE_TILE = 1024


class NativeEngine:
    """Steps for `model`, with float32 or bfloat16 weights on the CPU."""

    name = "native"
    asynchronous = False

    def __init__(self, model: Crosscoder, config: TrainConfig) -> None:
        self.state = AdamState(model, config.state)
        self._model = model
        self._config = config
        self._rows = rows_of(model, "int8" if config.candidates == "int8" else default_products())
        self.dense_above = DENSE_ABOVE
        self._audit = RecallAudit()
        self._scratch = Scratch()
        self._column_scale = torch.zeros(model.config.n_snapshots * model.config.d_model)
        """Of int8 products, from the first batch; 0 before."""
        for tensor in (model.W_enc, model.W_dec, *(tensor for _, tensor in self.state.tensors())):
            _core.prefer_huge_pages(array(tensor))

    def parameters_changed(self) -> None:
        """Make what is derived from the weights anew."""
        self._model.weights_changed()

    def settle(self) -> None:
        """Steps are done when they return."""

    def pending_error(self, *, wait: bool = False) -> int | None:
        """None: the loss tells."""
        return None

    def clear_error(self) -> None:
        """There is none."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint holds beside the parameters."""
        yield from self.state.tensors()
        if self._config.candidates == "int8":
            yield "int8_column_scale", self._column_scale
            yield "int8_audit", self._audit.tally

    @torch.no_grad()
    def step(self, x_BKD: Tensor, settings: StepSettings) -> StepStatistics:
        """Loss, gradients and update for one batch."""
        model = self._model
        x_BKD = model.check_input(x_BKD)
        self._rows = self._current_rows(x_BKD)
        sparse = sparse_pass(
            model,
            x_BKD,
            self._rows,
            self._scratch,
            sparsity_coefficient=settings.sparsity_coefficient,
            preactivation_coefficient=settings.preactivation_coefficient,
            generator=torch.Generator().manual_seed(settings.seed),
            max_density=self.dense_above,
        )
        if sparse is None:
            return self._dense_step(x_BKD, settings)
        if self._rows.products == "int8" and self._audit.due(settings.number):
            self._check_recall(x_BKD, sparse.parts.code)
        return self._sparse_step(sparse, settings)

    def _current_rows(self, x_BKD: Tensor) -> EncoderRows:
        """What the encoder needs beside the weights, up to date."""
        model = self._model
        if self._config.candidates != "int8" or self._audit.given_up:
            return rows_of(model, default_products())
        if not bool(self._column_scale.any()) and len(x_BKD):
            self._column_scale.copy_(column_scale(model.encoder_input(x_BKD).flatten(1)))
        return rows_of(model, "int8", self._column_scale)

    def _check_recall(self, x_BKD: Tensor, code: SparseCode) -> None:
        exact = encode(self._model, x_BKD[:TOKENS], "fp32")
        if self._audit.add(code, exact):
            warn(
                f"int8 candidates find only {float(self._audit.recall()):.5f} of the active pairs, fewer than "
                f"{REQUIRED_RECALL}; going on with exact ones, which is slower"
            )

    def _sparse_step(self, sparse: SparsePass, settings: StepSettings) -> StepStatistics:
        model, parts = self._model, sparse.parts
        statistics = StepStatistics(
            sparse.loss,
            parts.residual_BKD,
            sparse.open_K,
            sparse.fired_F,
            sparse.smallest_score,
            candidate_recall=self._audit.recall() if self._config.candidates == "int8" else None,
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
        dense = dense_pass(model, x_BKD, settings, DENSE_TILE)
        statistics = dense_statistics(dense)
        if not bool(torch.isfinite(dense.loss.total)):
            return statistics
        factor, norm = dense_clipping(dense, self._config.clip_norm)
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
