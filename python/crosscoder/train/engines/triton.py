"""Training steps on a GPU: one bf16 product, then only what is active (kernels/*/triton.py).

The host waits for nothing that the device has yet to compute. The number of pairs that may be on is copied to the host
while the step goes on; buffers hold four times the last number. If a batch has more than fits, its update is a
no-op on the device, and the engine does the batch again before anything else: at the end of the step where the last
number left less than a factor of two, else at the start of the next step (`settle`). A batch that is too dense for the
sparse kernels goes through dense products (`DensePass`). Which way a batch goes depends on the batch and the
parameters alone, not on what came before: a resumed run repeats the same bits.

Where a loss is not finite, this and all later updates are no-ops; `pending_error` tells.

Letters: B tokens, K snapshots, D width of one activation, F features, N pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import triton
from torch import Tensor

from crosscoder.config import TrainConfig
from crosscoder.kernels.decode.triton import residual_and_code_grad
from crosscoder.kernels.device import LANES, power_of_two
from crosscoder.kernels.encode.triton import SCALE, EncoderWeights, Gate, find_candidates, list_pairs
from crosscoder.kernels.threshold.reference import sample_tokens
from crosscoder.kernels.threshold.triton import threshold_gradient
from crosscoder.kernels.transpose.triton import transpose
from crosscoder.kernels.update.triton import (
    ADAM,
    NORMS,
    PAIRS,
    AdamScalars,
    PairGradients,
    PairSettings,
    adam_vector,
    gradients_of_pairs,
    limit_rows,
    row_layout,
    row_statistics,
    update_rows,
)
from crosscoder.model import Crosscoder
from crosscoder.penalty import LossTerms, Penalty
from crosscoder.train.engines.base import StepSettings, StepStatistics
from crosscoder.train.engines.reference import dense_pass, dense_statistics, tile_squares, with_norm
from crosscoder.train.state import AdamState

DENSE_ABOVE = 0.04
"""Share of the B x F pairs above which dense products win. From the bytes and FLOPs in kernels/update/README.md on an
H100 (five reads of a row of K D float32 numbers a pair, against six float32 products), not measured."""
DENSE_TILE_BYTES = 64 * 2**20
"""Of one (B, features of the tile) float32 matrix."""
ROOM = 4
"""Capacity of the buffers, as a multiple of the last number of pairs."""
LEAST_CAPACITY = 4096


class HostCopy:
    """The last value of a device tensor (1,) int64, copied to the host while the device works on."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._host = torch.zeros(1, dtype=torch.int64, pin_memory=cuda)
        self._event = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]

    def send(self, value: Tensor) -> None:
        self._host.copy_(value, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def wait(self) -> int:
        """The value sent last. Waits for what the device did before `send`, not for what came after it."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._host)

    def peek(self) -> int:
        """The newest value that has arrived."""
        return int(self._host)


@dataclass(frozen=True)
class _Sent:
    """A step whose number of pairs the host does not know yet."""

    x_BKD: Tensor
    settings: StepSettings
    statistics: StepStatistics
    capacity: int


@dataclass(frozen=True)
class _Vectors:
    """Gradients of the small parameters."""

    b_enc: Tensor
    b_dec: Tensor
    log_threshold: Tensor


class TritonEngine:
    """Computes steps for `model`, in place: its parameters and `state`."""

    name = "triton"
    asynchronous = True

    def __init__(self, model: Crosscoder, config: TrainConfig) -> None:
        self.model, self.config = model, config
        self.state = AdamState(model, config.state)
        self.dense_above = DENSE_ABOVE
        device = model.W_enc.device
        self.capacity = 0
        """Pairs that the buffers hold."""
        self._last_count: int | None = None
        self._sent: _Sent | None = None
        self._count = HostCopy(device)
        self._first_bad = torch.full((1,), -1, dtype=torch.int64, device=device)
        self._error = HostCopy(device)
        self._error.send(self._first_bad)
        F, K, D = model.W_enc.shape
        # As wide as for float32 activations: the cut must not change with the batch.
        self._slices = row_layout(config.batch_size, D, 4)
        self._fourth = torch.empty(F, K, self._slices.count, device=device)
        self._squares = torch.empty_like(self._fourth)
        in_bf16 = model.W_enc.dtype == torch.bfloat16
        self._shadow = None if in_bf16 else torch.empty(F, K, D, dtype=torch.bfloat16, device=device)
        self.parameters_changed()

    # ------------------------------------------------------------------------------------------- what others call

    @torch.no_grad()
    def step(self, x_BKD: Tensor, settings: StepSettings) -> StepStatistics:
        """Loss, gradients and update for one batch; see `Engine`.

        `x_BKD` must not be overwritten before the next step or `settle`. The statistics stay on the device; where the
        batch has to be done again they are written anew in place.
        """
        self.settle()
        self.model.check_input(x_BKD[:0])  # shape and dtype; the values stay as they are
        if x_BKD.dtype == torch.float64:
            x_BKD = x_BKD.float()
        x_BKD = x_BKD.to(self.model.W_enc.device, non_blocking=True).contiguous()
        statistics = self._attempt(x_BKD, settings)
        if self._sent is not None and 2 * (self._last_count or 0) > self.capacity:
            self.settle()
        return statistics

    @torch.no_grad()
    def settle(self) -> None:
        """Makes sure that the last step is done, and does it again if its pairs did not fit.

        Call it before reading parameters, state or statistics for good (a checkpoint, an evaluation).
        """
        sent, self._sent = self._sent, None
        if sent is None:
            return
        count = self._count.wait()
        self._last_count = count
        self.capacity = min(self.capacity, 4 * self._room(count))
        if count > sent.capacity:
            self._last_count = None  # so that the next attempt waits for its number
            again = self._attempt(sent.x_BKD, sent.settings)
            _overwrite(sent.statistics, again)

    def parameters_changed(self) -> None:
        """Somebody else wrote the parameters: forget what was derived from them. (Call `settle` before writing.)"""
        self.settle()
        F, K, D = self.model.W_enc.shape
        row_statistics[(F, K * self._slices.count)](
            self.model.W_enc, self.model.W_dec, self._bf16(), self._fourth, self._squares, K, D, self._slices.count,
            SHADOW=self._shadow is not None, BLOCK=self._slices.width, num_warps=self._slices.warps,
        )  # fmt: skip

    def pending_error(self, *, wait: bool = False) -> int | None:
        """The first step whose loss was not finite, or None. Since then parameters and state have not changed.

        What the host knows by now: a step or two may still be on their way, unless it shall `wait` for them.
        """
        self.settle()
        step = self._error.wait() if wait else self._error.peek()
        return None if step < 0 else step

    def clear_error(self) -> None:
        """Updates take effect again."""
        self._first_bad.fill_(-1)
        self._error.send(self._first_bad)
        self._error.wait()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint holds beside the parameters."""
        return self.state.tensors()

    # ------------------------------------------------------------------------------------------- one step

    def _attempt(self, x_BKD: Tensor, settings: StepSettings) -> StepStatistics:
        model = self.model
        weights = self._weights()
        gate = self._gate(settings)
        read_BKD = model.encoder_input(x_BKD)
        candidates = find_candidates(read_BKD, weights, gate)
        self._count.send(candidates.count)
        limit = self._limit(len(x_BKD))
        if self._last_count is None or self._last_count > min(self.capacity, limit):
            self._last_count = count = self._count.wait()
            if count > limit:
                return self._dense(x_BKD, settings)
            self.capacity = max(self.capacity, self._room(count))
        capacity = min(self.capacity, limit)
        fits = candidates.count <= capacity
        encoded = list_pairs(read_BKD, weights, gate, candidates, capacity)
        code, order = encoded.code, transpose(encoded.code)
        config, penalty = model.config, Penalty.of(model.config)
        narrow = config.threshold_mode == "narrow" and not config.selects_by_rank
        result = residual_and_code_grad(code, model.W_dec, model.b_dec, x_BKD, closed=narrow)
        B, K, _ = x_BKD.shape
        terms = max(1, B * K)
        preactivation = settings.preactivation_coefficient
        x_sum_KD = read_BKD.sum(dim=0, dtype=torch.float32) if preactivation else None
        pairs = gradients_of_pairs(
            code, order, result.dots_NPK, weights.norms_FK, weights.theta_F,
            None if x_sum_KD is None else self._score_sums(x_sum_KD, B),
            PairSettings(
                penalty, settings.sparsity_coefficient, preactivation, config.threshold_window if narrow else 0.0,
                config.gate == "shared",
            ),
        )  # fmt: skip
        reconstruction = result.square_sum / terms
        sparsity = settings.sparsity_coefficient * penalty.total(pairs.p_F)
        missing = reconstruction.new_zeros(())
        if pairs.gap_F is not None:
            missing = (preactivation / terms) * pairs.gap_F.sum()
        loss = LossTerms(reconstruction + sparsity + missing, reconstruction, sparsity, missing)
        allowed = self._allow(loss.total, settings.number, fits)
        vectors = _Vectors(
            b_enc=pairs.db_enc_F,
            b_dec=result.residual_BKD.sum(dim=0) * (2 / terms),
            log_threshold=pairs.dlog_threshold_F
            + self._threshold_gradient(read_BKD, result.residual_BKD, weights, pairs, settings),
        )
        lazy = self.config.optimizer_mode == "lazy"
        rows = _RowArguments(self, allowed, settings, pairs.fired_F, lazy=lazy, skip=lazy and not preactivation)
        gradient_norm, clip = None, None
        sparse = (
            order.feature_offsets, order.tokens, order.order, pairs.dh_N, code.values, code.gates, read_BKD,
            result.residual_BKD,
        )  # fmt: skip
        extra = (pairs.pull_FK, pairs.pull_FK if pairs.lift_F is None else pairs.lift_F, x_sum_KD)
        if self.config.clip_norm is not None:
            squares = rows.squares(sparse, extra, 2 / terms)
            gradient_norm, clip = self._clip(squares.sum(), vectors)
        rows.update(sparse, extra, 2 / terms, clip)
        self._finish(vectors, allowed, settings, pairs.fired_F, clip, lazy=lazy, skip=lazy and not preactivation)
        statistics = StepStatistics(
            loss, result.residual_BKD, result.open_K, pairs.fired_F.long(), encoded.smallest_score, gradient_norm
        )
        self._sent = _Sent(x_BKD, settings, statistics, capacity)
        return statistics

    def _dense(self, x_BKD: Tensor, settings: StepSettings) -> StepStatistics:
        tile = max(1, DENSE_TILE_BYTES // (4 * max(1, len(x_BKD))))
        dense = dense_pass(self.model, x_BKD, settings, tile)
        allowed = self._allow(dense.loss.total, settings.number, None)
        lazy = self.config.optimizer_mode == "lazy"
        skip = lazy and not settings.preactivation_coefficient
        rows = _RowArguments(self, allowed, settings, dense.fired_F.int(), lazy=lazy, skip=skip)
        F = self.model.config.n_features
        vectors = _Vectors(dense.db_dec_KD.new_empty(F), dense.db_dec_KD, dense.db_dec_KD.new_empty(F))
        gradient_norm, clip = None, None
        if self.config.clip_norm is not None:
            squares = dense.db_dec_KD.new_zeros(())
            for _, gradients in dense.gradients():
                squares += tile_squares(gradients)
            no_vectors = _Vectors(vectors.b_enc[:0], dense.db_dec_KD, vectors.b_enc[:0])  # the tiles have the others
            gradient_norm, clip = self._clip(squares, no_vectors)
        for features, gradients in dense.gradients():
            vectors.b_enc[features], vectors.log_threshold[features] = gradients.b_enc, gradients.log_threshold
            rows.update_dense(gradients.W_enc, gradients.W_dec, features.start, clip)
        self._finish(vectors, allowed, settings, dense.fired_F.int(), clip, lazy=lazy, skip=skip)
        return with_norm(dense_statistics(dense), gradient_norm)

    # ------------------------------------------------------------------------------------------- its parts

    def _bf16(self) -> Tensor:
        return self.model.W_enc if self._shadow is None else self._shadow

    def _weights(self) -> EncoderWeights:
        model = self.model
        norms_FK = self._squares.sum(dim=2).sqrt()
        w_norms_F = self._fourth.sum(dim=(1, 2)).sqrt().sqrt() / SCALE.value
        return EncoderWeights(
            model.W_enc, self._bf16(), w_norms_F, model.b_enc, norms_FK, norms_FK.amax(dim=1), model.threshold
        )

    def _gate(self, settings: StepSettings) -> Gate:
        config = self.model.config
        narrow = config.threshold_mode == "narrow" and not config.selects_by_rank
        return Gate(
            config.gate,
            half_window=config.threshold_window / 2 if narrow else 0.0,
            above=settings.preactivation_coefficient > 0,
            top_k=config.top_k or 0,
        )

    def _limit(self, n_tokens: int) -> int:
        """Pairs above which a batch goes through dense products."""
        return int(self.dense_above * n_tokens * self.model.config.n_features)

    def _room(self, count: int) -> int:
        return max(LEAST_CAPACITY, power_of_two(ROOM * count))

    def _score_sums(self, x_sum_KD: Tensor, n_tokens: int) -> Tensor:
        """sum_b h_b,f (F,) over all tokens."""
        x_sum = x_sum_KD.flatten()
        if self.model.W_enc.dtype == torch.float32:
            sums_F = self.model.W_enc.flatten(1) @ x_sum
        else:
            rows = self.model.W_enc.flatten(1).split(1024)  # type: ignore[no-untyped-call]
            sums_F = torch.cat([some.float() @ x_sum for some in rows])
        return sums_F + n_tokens * self.model.b_enc

    def _allow(self, loss: Tensor, number: int, fits: Tensor | None) -> Tensor:
        """(1,) int32, 1: the update takes effect. Notes the first step whose loss is not finite."""
        finite = torch.isfinite(loss).reshape(1)
        judged = torch.ones_like(finite) if fits is None else fits
        self._first_bad.copy_(torch.where(judged & ~finite & (self._first_bad < 0), number, self._first_bad))
        self._error.send(self._first_bad)
        return (finite & judged & (self._first_bad < 0)).to(torch.int32)

    def _threshold_gradient(
        self, x_BKD: Tensor, residual_BKD: Tensor, weights: EncoderWeights, pairs: PairGradients, settings: StepSettings
    ) -> Tensor:
        """The part of dlog_theta (F,) that needs more than the pairs."""
        config, penalty = self.model.config, Penalty.of(self.model.config)
        B, K, _ = x_BKD.shape
        if config.selects_by_rank or config.threshold_mode == "narrow" or not B:
            return torch.zeros_like(weights.theta_F)
        tokens, factor = None, 1.0
        if config.threshold_mode == "sampled":
            generator = torch.Generator().manual_seed(settings.seed)
            tokens, factor = sample_tokens(B, config.threshold_sample, generator)
            if x_BKD.is_cuda:
                tokens = tokens.pin_memory().to(x_BKD.device, non_blocking=True)
        weight_F = settings.sparsity_coefficient * penalty.total_slope(pairs.p_F) / (B * K)
        gradient_F = threshold_gradient(
            x_BKD, residual_BKD, weights.W_enc_FKD, self.model.W_dec, self.model.b_enc, weights.norms_FK,
            weights.theta_F, weight_F, penalty=penalty, scale=2 / (B * K), window=config.threshold_window,
            shared=config.gate == "shared", tokens=tokens,
        )  # fmt: skip
        return gradient_F * factor

    def _clip(self, squares: Tensor, vectors: _Vectors) -> tuple[Tensor, Tensor]:
        """The gradient's norm and what it is multiplied with, as torch.nn.utils.clip_grad_norm_ does."""
        assert self.config.clip_norm is not None
        squares = squares + vectors.b_enc.square().sum() + vectors.b_dec.square().sum()
        if not self.model.config.selects_by_rank:
            squares = squares + vectors.log_threshold.square().sum()
        norm = squares.sqrt()
        return norm, (self.config.clip_norm / (norm + 1e-6)).clamp_max(1.0)

    def _finish(
        self, vectors: _Vectors, allowed: Tensor, settings: StepSettings, fired_F: Tensor, clip: Tensor | None,
        *, lazy: bool, skip: bool,
    ) -> None:  # fmt: skip
        """The decoder's limit, the small parameters, and when each row was last updated."""
        model, step = self.model, settings.number + 1
        F, K, D = model.W_enc.shape
        if self.config.decoder_norm_limit is not None:
            limit_rows[(F,)](
                model.W_dec, self._squares, allowed, self.config.decoder_norm_limit, K, D, self._slices.count,
                short_seed(settings.seed), BF16=model.W_dec.dtype == torch.bfloat16, SNAPSHOTS=power_of_two(K),
                BLOCK=self._slices.width, num_warps=self._slices.warps,
            )  # fmt: skip
        small = [("b_enc", vectors.b_enc, settings.lr), ("b_dec", vectors.b_dec, settings.lr)]
        if not model.config.selects_by_rank:
            small.append(("log_threshold", vectors.log_threshold, settings.threshold_lr))
        for name, gradient, lr in small:
            parameter, moments = getattr(model, name), self.state[name]
            of_rows = name == "b_enc"
            adam_vector[(triton.cdiv(parameter.numel(), 256),)](
                parameter, moments["m"], moments["v"], gradient, fired_F, self.state.last_step_F, allowed,
                allowed if clip is None else clip, parameter.numel(), *AdamScalars(lr, step).arguments(), step,
                SKIP=skip and of_rows, LAZY=lazy and of_rows, CLIP=clip is not None, BLOCK=256, num_warps=4,
            )  # fmt: skip
        touched_F = (allowed != 0).expand(F)
        if skip:
            touched_F = touched_F & (fired_F > 0)
        self.state.last_step_F.masked_fill_(touched_F, step)


class _RowArguments:
    """Launches `update_rows` with what does not change within a step."""

    def __init__(
        self, engine: TritonEngine, allowed: Tensor, settings: StepSettings, fired_F: Tensor, *, lazy: bool, skip: bool
    ) -> None:
        self.engine, self.allowed, self.settings, self.fired_F = engine, allowed, settings, fired_F
        self.lazy, self.skip = lazy, skip

    def squares(self, sparse: tuple[Tensor, ...], extra: tuple[Tensor, Tensor, Tensor | None], scale: float) -> Tensor:
        """Sums of the squares of dW_enc and dW_dec, a slice of a row each."""
        out = torch.empty_like(self.engine._squares)
        # A feature that did not fire has no gradient, unless all have one.
        self._launch(NORMS, sparse, None, 0, extra, scale, None, out, self.skip or extra[2] is None)
        return out

    def update(
        self, sparse: tuple[Tensor, ...], extra: tuple[Tensor, Tensor, Tensor | None], scale: float, clip: Tensor | None
    ) -> None:
        self._launch(ADAM, sparse, None, 0, extra, scale, clip, self.engine._squares, self.skip)

    def update_dense(self, dW_enc_TKD: Tensor, dW_dec_TKD: Tensor, first: int, clip: Tensor | None) -> None:
        """For features `first` on, from gradients that are there."""
        nothing = (self.engine._squares, self.engine._squares, None)
        dense = (dW_enc_TKD, dW_dec_TKD)
        self._launch(ADAM, None, dense, first, nothing, 1.0, clip, self.engine._squares, self.skip)

    def _launch(
        self, what: int, sparse: tuple[Tensor, ...] | None, dense: tuple[Tensor, Tensor] | None, first: int,
        extra: tuple[Tensor, Tensor, Tensor | None], scale: float, clip: Tensor | None, squares: Tensor, skip: bool,
    ) -> None:  # fmt: skip
        engine, settings = self.engine, self.settings
        model, slices, state = engine.model, engine._slices, engine.state
        F, K, D = model.W_enc.shape
        pull, lift, x_sum = extra
        nothing = engine._squares
        step = settings.number + 1
        moments: list[Tensor] = []
        for name in ("W_enc", "W_dec"):
            kept = state[name]
            m, v = kept["m"], kept["v"]
            moments += [getattr(model, name), m, v, kept.get("m_scale", nothing), kept.get("v_scale", nothing)]
        rows = F if dense is None else len(dense[0])
        update_rows[(rows, K * slices.count)](
            *(sparse if sparse is not None else (nothing,) * 8), *(dense if dense is not None else (nothing, nothing)),
            first, pull, lift, nothing if x_sum is None else x_sum, self.fired_F, state.last_step_F, self.allowed,
            nothing if clip is None else clip, *moments, engine._bf16(), engine._fourth, squares,
            K, D, slices.count, -(-D // LANES), scale, *AdamScalars(settings.lr, step).arguments(), step,
            short_seed(settings.seed),
            WHAT=what, DENSE=dense is not None, SKIP=skip, LAZY=self.lazy, LIFT=x_sum is not None,
            CLIP=clip is not None, ENCODER=True, DECODER=True, EIGHT_BIT="m_scale" in state["W_enc"],
            BF16=model.W_enc.dtype == torch.bfloat16, SHADOW=engine._shadow is not None,
            PAIRS=PAIRS, BLOCK=slices.width, LANES=LANES, num_warps=slices.warps,
        )  # fmt: skip


def short_seed(seed: int) -> int:
    """A step's seed in 31 bits: what a kernel takes."""
    return (seed ^ (seed >> 31) * 0x9E3779B1) & 0x7FFFFFFF


def _tensors(statistics: StepStatistics) -> Iterator[Tensor]:
    values = [getattr(statistics.loss, field.name) for field in fields(LossTerms)]
    values += [getattr(statistics, field.name) for field in fields(StepStatistics) if field.name != "loss"]
    return (value for value in values if value is not None)


def _overwrite(old: StepStatistics, new: StepStatistics) -> None:
    for there, value in zip(_tensors(old), _tensors(new), strict=True):
        there.copy_(value)
