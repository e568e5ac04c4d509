"""One training step: the sparse way or the dense way, the check of the loss, clipping, the update, the statistics.

What a backend brings is in `crosscoder.backends.base.Training`. Which way a batch goes depends on the batch and the
parameters alone, not on what came before: a resumed run repeats the same bits.

Letters: B tokens, K snapshots, D width of one activation, F features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from crosscoder.backends.adam_state import AdamState
from crosscoder.backends.base import Room, SparsePass, StepSettings, StepStatistics, Update
from crosscoder.backends.closed_form import DensePass, Gradients
from crosscoder.config import TrainConfig
from crosscoder.model import Crosscoder
from crosscoder.parameters import Weights
from crosscoder.precision import full_precision


class Engine:
    """Computes steps for `model`, in place: its parameters and `state`."""

    def __init__(self, model: Crosscoder, config: TrainConfig) -> None:
        backend = model.backend(config.backend, config.candidates)
        weights = model.weights()
        self.name = backend.name
        self.asynchronous = backend.asynchronous
        """Is the host not to wait for a step's loss?"""
        self.state = AdamState(weights, config.state)
        self._model, self._config = model, config
        self._training = backend.training(weights, config, self.state)
        self.dense_above = self._training.dense_above
        """The density (share of all pairs of token and feature) above which a step goes the dense way."""

    @torch.no_grad()
    def step(self, x_BKD: Tensor, settings: StepSettings) -> StepStatistics:
        """Loss, gradients and update for one batch.

        Where the loss is not finite, parameters and state are left as they were; the caller finds out from the
        statistics. Raises `DataError` on a wrong shape.
        """
        return self._attempt(self._training.input(self._model.weights(), x_BKD), settings)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint holds beside the parameters, under unique names; loading copies into them."""
        yield from self.state.tensors()
        yield from self._training.tensors()

    def settle(self) -> None:
        """Make sure that the last step is done. Call it before parameters, state or statistics are read for good, and
        before somebody else writes them."""

    def pending_error(self, *, wait: bool = False) -> int | None:
        """The first step whose loss was not finite, where the host only finds out later; see `AsynchronousEngine`."""
        return None

    def clear_error(self) -> None:
        """Updates take effect again after such a step."""

    # ------------------------------------------------------------------------------------------- its parts

    def _attempt(self, x_BKD: Tensor, settings: StepSettings) -> StepStatistics:
        weights = self._model.weights()
        with full_precision(x_BKD.device):
            if self.dense_above >= 0:
                sparse = self._training.sparse_pass(weights, x_BKD, settings, self.dense_above, self._room(x_BKD))
                if sparse is not None:
                    return self._sparse_step(weights, sparse, settings)
            return self._dense_step(weights, x_BKD, settings)

    def _sparse_step(self, weights: Weights, batch: SparsePass, settings: StepSettings) -> StepStatistics:
        update = self._update(batch.statistics, settings, sparse=True)
        if update is None:
            return batch.statistics
        norm = None
        if self._config.clip_norm is not None:
            vectors = (batch.db_enc_F, batch.db_dec_KD, batch.dlog_threshold_F)
            norm, update = _clipped(self._training.squares(weights, batch), vectors, self._config.clip_norm, update)
        self._training.update(weights, batch, update)
        self._finish(weights, batch.db_enc_F, batch.db_dec_KD, batch.dlog_threshold_F, batch.statistics, update)
        return dataclasses.replace(batch.statistics, gradient_norm=norm)

    def _dense_step(self, weights: Weights, x_BKD: Tensor, settings: StepSettings) -> StepStatistics:
        """The fallback, and the reference's only way: torch's products, tile by tile, and the backend's update."""
        dense = DensePass(weights, weights.input(x_BKD), settings.loss(), self._training.tile(len(x_BKD)))
        statistics = StepStatistics(dense.loss, dense.residual_BKD, dense.open_K, dense.fired_F, dense.smallest_score)
        update = self._update(statistics, settings, sparse=False)
        if update is None:
            return statistics
        norm = None
        if self._config.clip_norm is not None:
            squares = torch.stack([_tile_squares(gradients) for _, gradients in dense.gradients()]).sum()
            norm, update = _clipped(squares, (dense.db_dec_KD,), self._config.clip_norm, update)
        # A tile's gradients are made just before its update: they need its own old weights, and the batch's loss.
        db_enc_F, dlog_threshold_F = dense.db_dec_KD.new_empty(2, len(weights.W_enc))
        for features, gradients in dense.gradients():
            db_enc_F[features], dlog_threshold_F[features] = gradients.b_enc, gradients.log_threshold
            self._training.update_tile(weights, features, gradients, dense.fired_F, update)
        self._finish(weights, db_enc_F, dense.db_dec_KD, dlog_threshold_F, statistics, update)
        return dataclasses.replace(statistics, gradient_norm=norm)

    def _finish(
        self,
        weights: Weights,
        db_enc_F: Tensor,
        db_dec_KD: Tensor,
        dlog_threshold_F: Tensor,
        statistics: StepStatistics,
        update: Update,
    ) -> None:
        settings = update.settings
        self._training.finish(weights, db_enc_F, statistics.fired_F, update)
        self._training.update_vector(weights, "b_dec", db_dec_KD, settings.lr, update)
        if weights.gate.learned:
            self._training.update_vector(weights, "log_threshold", dlog_threshold_F, settings.threshold_lr, update)

    def _update(self, statistics: StepStatistics, settings: StepSettings, *, sparse: bool) -> Update | None:
        """The update that these statistics allow: none where the loss is not finite."""
        if not bool(torch.isfinite(statistics.loss.total)):
            return None
        return Update(settings, self._config.optimizer_mode == "lazy", self._config.decoder_norm_limit)

    def _room(self, x_BKD: Tensor) -> Room | None:
        """None: the backend knows how many pairs there are."""
        return None


def _tile_squares(gradients: Gradients) -> Tensor:
    """() float64: squared norm of a tile's gradients, without b_dec's."""
    # The norms of rows first: a copy of a tile in float64 may be larger than all weights.
    norms = [torch.linalg.vector_norm(part.flatten(1), dim=1) for part in (gradients.W_enc, gradients.W_dec)]
    parts = (*norms, gradients.b_enc, gradients.log_threshold)
    return torch.stack([part.double().square().sum() for part in parts]).sum()


def _clipped(squares: Tensor, vectors: tuple[Tensor, ...], limit: float, update: Update) -> tuple[Tensor, Update]:
    """The gradient's norm, and the update with torch.nn.utils.clip_grad_norm_'s factor; no host waits for them."""
    for vector in vectors:
        squares = squares + vector.double().square().sum()
    norm = squares.sqrt()
    return norm, dataclasses.replace(update, factor=(limit / (norm + 1e-6)).clamp_max(1.0))
