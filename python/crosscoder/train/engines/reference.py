"""The training step in dense torch: any device, any floating dtype. What the fast engines must agree with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from crosscoder.config import TrainConfig
from crosscoder.kernels.update.reference import adam
from crosscoder.model import Crosscoder
from crosscoder.step import DensePass, Gradients
from crosscoder.train.engines.base import StepSettings, StepStatistics
from crosscoder.train.state import MATRICES, AdamState, dequantize_m, dequantize_v, quantize_m, quantize_v

TILE = 4096


class ReferenceEngine:
    """Dense steps for `model`."""

    name = "reference"
    asynchronous = False
    dense_above = -1.0

    def __init__(self, model: Crosscoder, config: TrainConfig) -> None:
        self.state = AdamState(model, config.state)
        self._model = model
        self._config = config

    def settle(self) -> None:
        """Steps are done when they return."""

    def pending_error(self, *, wait: bool = False) -> int | None:
        """None: the loss tells."""
        return None

    def clear_error(self) -> None:
        """There is none."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint holds beside the parameters."""
        return self.state.tensors()

    def parameters_changed(self) -> None:
        """Nothing is kept that depends on them."""

    @torch.no_grad()
    def step(self, x_BKD: Tensor, settings: StepSettings) -> StepStatistics:
        """Loss, gradients and update for one batch."""
        dense = dense_pass(self._model, x_BKD, settings, TILE)
        statistics = dense_statistics(dense)
        if not bool(torch.isfinite(dense.loss.total)):
            return statistics
        # The update needs all gradients at the old weights only within a tile: its loss is already computed.
        factor, norm = dense_clipping(dense, self._config.clip_norm)
        generator = torch.Generator().manual_seed(settings.seed)
        for features, gradients in dense.gradients():
            touched = dense.fired_F[features] > 0
            if settings.preactivation_coefficient or self._config.optimizer_mode == "exact":
                touched = torch.ones_like(touched)
            self._update_rows(features, gradients, touched, factor, settings, generator)
            update_vector(
                self._model, self.state, "log_threshold", gradients.log_threshold * factor, settings, features
            )
        update_vector(self._model, self.state, "b_dec", dense.db_dec_KD * factor, settings)
        return with_norm(statistics, norm)

    def _update_rows(
        self,
        features: slice,
        gradients: Gradients,
        touched_T: Tensor,
        factor: float,
        settings: StepSettings,
        generator: torch.Generator,
    ) -> None:
        t = settings.number + 1
        rows = touched_T.nonzero().squeeze(1)
        all_rows = rows + features.start
        elapsed_n = t - self.state.last_step_F[all_rows]
        for name in (*MATRICES, "b_enc"):
            parameter, moments = getattr(self._model, name), self.state[name]
            gradient = getattr(gradients, name)[rows] * factor
            elapsed = elapsed_n.to(gradient.dtype).view(-1, *(1,) * (gradient.ndim - 1))
            w = parameter[all_rows].to(gradient.dtype)
            eight_bit = "m_scale" in moments
            m, v = moments["m"][all_rows], moments["v"][all_rows]
            if eight_bit:
                m = dequantize_m(m, moments["m_scale"][all_rows])
                v = dequantize_v(v, moments["v_scale"][all_rows])
            adam(w, m, v, gradient, lr=settings.lr, t=t, elapsed=elapsed)
            if eight_bit:
                noise = torch.rand(2, *m.shape, generator=generator).to(m.device)
                m, moments["m_scale"][all_rows] = quantize_m(m, noise[0])
                v, moments["v_scale"][all_rows] = quantize_v(v, noise[1])
                w = _round_stochastically(w, generator)
            moments["m"][all_rows], moments["v"][all_rows] = m, v
            parameter[all_rows] = w.to(parameter.dtype)
        self.state.last_step_F[all_rows] = t
        limit = self._config.decoder_norm_limit
        if limit is not None:
            rows_nKD = self._model.W_dec[all_rows]
            largest_n = torch.linalg.vector_norm(rows_nKD.to(gradients.W_dec.dtype), dim=2).amax(dim=1)
            self._model.W_dec[all_rows] = (rows_nKD * (limit / largest_n).clamp_max(1)[:, None, None]).to(rows_nKD)


def _round_stochastically(w: Tensor, generator: torch.Generator) -> Tensor:
    """bfloat16, up or down so that the mean is `w`."""
    low = torch.randint(0, 1 << 16, w.shape, generator=generator, dtype=torch.int32).to(w.device)
    return ((w.float().view(torch.int32) + low) & ~0xFFFF).view(torch.float32).bfloat16()


def dense_pass(model: Crosscoder, x_BKD: Tensor, settings: StepSettings, tile: int) -> DensePass:
    """The dense pass that a step's settings ask for."""
    return DensePass(
        model,
        x_BKD,
        sparsity_coefficient=settings.sparsity_coefficient,
        preactivation_coefficient=settings.preactivation_coefficient,
        generator=torch.Generator().manual_seed(settings.seed),
        tile=tile,
    )


def dense_statistics(dense: DensePass) -> StepStatistics:
    """What a dense pass has to tell."""
    return StepStatistics(dense.loss, dense.residual_BKD, dense.open_K, dense.fired_F, dense.smallest_score)


def with_norm(statistics: StepStatistics, norm: Tensor | None) -> StepStatistics:
    """The same with the gradient's norm."""
    return StepStatistics(**{**vars(statistics), "gradient_norm": norm})


def tile_squares(gradients: Gradients) -> Tensor:
    """(): squared norm of a tile's gradients, without b_dec's."""
    parts = (gradients.W_enc, gradients.W_dec, gradients.b_enc, gradients.log_threshold)
    return torch.stack([part.double().square().sum() for part in parts]).sum()


def dense_clipping(dense: DensePass, limit: float | None) -> tuple[float, Tensor | None]:
    """What a dense pass's gradient is multiplied by, and its norm (None without a limit)."""
    if limit is None:
        return 1.0, None
    squares = [tile_squares(gradients) for _, gradients in dense.gradients()]
    norm = (torch.stack(squares).sum() + dense.db_dec_KD.double().square().sum()).sqrt()
    return clip_factor(norm, limit), norm


def clip_factor(norm: Tensor, limit: float) -> float:
    """What the gradient is multiplied by: torch.nn.utils.clip_grad_norm_'s rule."""
    return min(1.0, limit / (float(norm) + 1e-6))


@torch.no_grad()
def update_vector(
    model: Crosscoder,
    state: AdamState,
    name: str,
    gradient: Tensor,
    settings: StepSettings,
    features: slice = slice(None),
) -> None:
    """An exact Adam step for b_dec, or for log_threshold at `features` with its own learning rate."""
    if name == "log_threshold" and model.config.selects_by_rank:
        return
    lr = settings.threshold_lr if name == "log_threshold" else settings.lr
    parameter, moments = getattr(model, name), state[name]
    m, v = moments["m"][features], moments["v"][features]
    w = parameter[features].to(m.dtype)
    adam(w, m, v, gradient.to(m.dtype), lr=lr, t=settings.number + 1)
    parameter[features] = w.to(parameter.dtype)
