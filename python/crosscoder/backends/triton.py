"""Triton on a GPU: one bf16 product, then only the pairs that are on (kernels/*/triton.py).

Letters: B tokens, K snapshots, D width of one activation, F features, N pairs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from crosscoder.backends.adam_state import AdamState
from crosscoder.backends.base import (
    Backend,
    Room,
    SparsePass,
    StepSettings,
    StepStatistics,
    Training,
    Update,
    differentiable,
)
from crosscoder.backends.closed_form import Gradients
from crosscoder.code import SparseCode
from crosscoder.config import CrosscoderConfig, TrainConfig
from crosscoder.devices import sent
from crosscoder.gate import Gate
from crosscoder.kernels.decode.triton import decode, residual_and_dots
from crosscoder.kernels.device import LANES, power_of_two
from crosscoder.kernels.encode.triton import EncoderWeights, encode, find_candidates, list_pairs
from crosscoder.kernels.threshold.reference import sample_tokens
from crosscoder.kernels.threshold.triton import threshold_gradient
from crosscoder.kernels.transpose.reference import FeatureOrder
from crosscoder.kernels.transpose.triton import transpose
from crosscoder.kernels.update.triton import (
    ADAM,
    GRADIENT,
    NORMS,
    PAIRS,
    ROW_REGISTERS,
    AdamScalars,
    adam_vector,
    limit_rows,
    row_statistics,
    span,
    update_rows,
)
from crosscoder.kernels.update.triton_pairs import PairGradients, gradients_of_pairs
from crosscoder.parameters import Weights
from crosscoder.penalty import LossSettings, LossTerms, Penalty
from crosscoder.sharding import ONE_PROCESS, Sharding

DENSE_ABOVE = {torch.float32: 0.04, torch.bfloat16: 0.01}
"""Share of the B x F pairs above which dense products win, by the weights' dtype. From the bytes and FLOPs in
kernels/update/README.md on an H100 (five reads of a row of K D numbers a pair, against six dense products), not
measured."""
LOST = 4e-10
"""Numbers below it have a fourth power that float32 does not hold."""
DENSE_TILE_BYTES = 64 * 2**20
"""Of one (B, features of the tile) float32 matrix."""
DENSE_ROWS_BYTES = 2**28
"""Of the gradient in a tile's rows of one matrix, float32; several such are there at a time, where 6.9B with
F = 65,536 leaves 10 GB (benchmarks/memory_ghost.py)."""


@dataclass(frozen=True)
class Parts:
    """What the gradients of W_enc and W_dec are made of."""

    code: SparseCode
    order: FeatureOrder
    pairs: PairGradients
    read_BKD: Tensor
    residual_BKD: Tensor
    x_sum_KD: Tensor | None


class DerivedRows:
    """What is derived from W_enc and W_dec: sums of W_enc^4 and W_dec^2 by blocks of a row, and W_enc in bf16."""

    def __init__(self, weights: Weights) -> None:
        F, K, D = weights.W_enc.shape
        self.shape, self.dtype = weights.W_enc.shape, weights.W_enc.dtype
        self.device = weights.W_enc.device
        self.fourth = torch.empty(F, K, -(-D // LANES), device=self.device, dtype=torch.float32)
        self.squares = torch.empty_like(self.fourth)
        in_bf16 = self.dtype == torch.bfloat16
        self.shadow = None if in_bf16 else torch.empty(self.shape, dtype=torch.bfloat16, device=self.device)
        self._seen: tuple[int, ...] | None = None

    def fit(self, weights: Weights) -> bool:
        """Are they of such weights?"""
        W = weights.W_enc
        return (W.shape, W.dtype, W.device) == (self.shape, self.dtype, self.device)

    def refresh(self, weights: Weights) -> None:
        """Bring everything up to date, if the weights changed since the last time."""
        state = weights.state()
        if state is not None and state == self._seen:
            return
        row_statistics[(self.fourth.numel(),)](
            W_enc_ptr=weights.W_enc, W_dec_ptr=weights.W_dec, shadow_ptr=self.bf16(weights), fourth_ptr=self.fourth,
            squares_ptr=self.squares, D=self.shape[2], blocks=self.fourth.shape[2], SHADOW=self.shadow is not None,
            LANES=LANES, num_warps=1,
        )  # fmt: skip
        self._seen = state

    def current(self, weights: Weights) -> None:
        """The kernels have changed weights and rows together."""
        self._seen = weights.state()

    def bf16(self, weights: Weights) -> Tensor:
        """W_enc in bf16."""
        return weights.W_enc if self.shadow is None else self.shadow

    def encoder(self, weights: Weights, gate: Gate) -> EncoderWeights:
        """What encoding needs."""
        norms_FK = self.squares.sum(dim=2).sqrt() * weights.snapshot_scale.float()
        # Fourth powers under float32's range are lost: the norm of what may be lost is added.
        w_norms_F = self.fourth.sum(dim=(1, 2)).sqrt().sqrt() + LOST * self.shape[1:].numel() ** 0.25
        bias_F = weights.b_enc.detach().float()
        return EncoderWeights(
            weights.W_enc, self.bf16(weights), w_norms_F, bias_F, norms_FK, norms_FK.amax(dim=1), weights.theta(gate)
        )


class TritonBackend(Backend):
    """Keeps sums of the rows' powers and W_enc in bf16."""

    name = "triton"
    asynchronous = True

    def __init__(self) -> None:
        self._rows: DerivedRows | None = None

    @classmethod
    def fits(cls, weights: Weights) -> str | None:
        """float32 or bfloat16 on a CUDA device, or anywhere in Triton's interpreter."""
        W = weights.W_enc
        if W.dtype not in (torch.float32, torch.bfloat16):
            return f"needs float32 or bfloat16 weights, not {W.dtype}"
        if W.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return (
                f"needs weights on a CUDA device, not on {W.device} (or TRITON_INTERPRET=1 in the environment from the "
                "start, to try its kernels slowly on a CPU)"
            )
        return None

    def rows(self, weights: Weights) -> DerivedRows:
        """What is derived from the weights, up to date."""
        if self._rows is None or not self._rows.fit(weights):
            self._rows = DerivedRows(weights)
        self._rows.refresh(weights)
        return self._rows

    @torch.no_grad()
    def encode(self, weights: Weights, x_BKD: Tensor, candidates: str = "exact") -> SparseCode:
        """The code of a batch (B, K, D)."""
        gate = weights.gate
        return encode(weights.encoder_input(x_BKD), self.rows(weights).encoder(weights, gate), gate)

    @torch.no_grad()
    def decode(self, weights: Weights, code: SparseCode) -> Tensor:
        """The reconstruction (B, K, D) float32."""
        return decode(code, weights.W_dec, weights.b_dec)

    def loss(self, weights: Weights, x_BKD: Tensor, settings: LossSettings) -> LossTerms:
        """From the sparse code; the host waits for the number of its pairs."""
        return differentiable(self, weights, x_BKD, settings)

    @torch.no_grad()
    def sparse_pass(
        self, weights: Weights, x_BKD: Tensor, settings: LossSettings, *, sharding: Sharding = ONE_PROCESS
    ) -> SparsePass:
        """Loss and gradients of a batch."""
        everything = lambda count: max(1, int(count))  # noqa: E731 - a function of one line
        batch = sparse_pass(weights, x_BKD.contiguous(), self.rows(weights), settings, everything, sharding=sharding)
        assert batch is not None
        return batch

    @torch.no_grad()
    def gradients(self, weights: Weights, batch: SparsePass) -> tuple[Tensor, Tensor]:
        """dW_enc and dW_dec, float32."""
        dW_enc_FKD, dW_dec_FKD = weights.W_enc.detach().new_empty(2, *weights.W_enc.shape, dtype=torch.float32)
        _launch_rows(GRADIENT, weights, self.rows(weights), batch.parts, (dW_enc_FKD, dW_dec_FKD))
        return dW_enc_FKD, dW_dec_FKD

    def training(self, weights: Weights, config: TrainConfig, state: AdamState) -> Training:
        """Sparse steps, dense ones in torch, for which the host does not wait."""
        return TritonTraining(self, weights, state)


def sparse_pass(
    weights: Weights,
    x_BKD: Tensor,
    rows: DerivedRows,
    settings: LossSettings,
    room: Room,
    *,
    sharding: Sharding = ONE_PROCESS,
) -> SparsePass | None:
    """Loss and gradients of a batch (B, K, D), contiguous; None where `room` says so."""
    config, penalty = weights.config, Penalty.of(weights.config)
    preactivation = settings.preactivation_coefficient
    gate = Gate.for_loss(config, training=weights.training, above=preactivation > 0)
    read_BKD = weights.encoder_input(x_BKD)
    encoder = rows.encoder(weights, gate)
    sample = TokenSample.draw(config, gate, settings, read_BKD)
    # The encoder's product is good enough where weights are bf16's themselves, and where a sample's noise is far above
    # its rounding.
    keep = sample is not None and (weights.W_enc.dtype == torch.bfloat16 or sample.tokens is not None)
    candidates = find_candidates(read_BKD, encoder, gate, keep=keep, tokens=None if sample is None else sample.tokens)
    capacity = room(candidates.count)
    if capacity is None:
        return None
    encoded = list_pairs(read_BKD, encoder, gate, candidates, capacity)
    code, order = encoded.code, transpose(encoded.code)
    decoded = residual_and_dots(code, weights.W_dec, weights.b_dec, x_BKD, closed=gate.window > 0, sharding=sharding)
    B, K, _ = x_BKD.shape
    terms = max(1, B * K)
    x_sum_KD = read_BKD.sum(dim=0, dtype=torch.float32) if preactivation else None
    score_sums_F = None if x_sum_KD is None else weights.score_sums(x_sum_KD, B)
    pairs = gradients_of_pairs(
        code, order, decoded.dots_NPK, encoder.norms_FK, encoder.theta_F, score_sums_F, penalty, gate, settings
    )
    reconstruction = decoded.square_sum / terms
    sparsity = settings.sparsity_coefficient * penalty.total(pairs.p_F)
    missing = reconstruction.new_zeros(())
    if pairs.gap_F is not None:
        missing = (preactivation / terms) * pairs.gap_F.sum()
    loss = LossTerms(reconstruction + sparsity + missing, reconstruction, sparsity, missing)
    dlog_threshold_F = pairs.dlog_threshold_F
    if sample is not None:
        weight_F = settings.sparsity_coefficient * penalty.total_slope(pairs.p_F) / terms
        gradient_F = threshold_gradient(
            read_BKD, decoded.residual_BKD, weights.W_enc, weights.W_dec, encoder.b_enc_F, encoder.norms_FK,
            encoder.theta_F, weight_F, penalty=penalty, scale=2 / terms, window=config.threshold_window, gate=gate,
            tokens=sample.tokens, products_nF=candidates.products_nF,
        )  # fmt: skip
        dlog_threshold_F = dlog_threshold_F + gradient_F * sample.factor
    return SparsePass(
        StepStatistics(loss, decoded.residual_BKD, decoded.open_K, pairs.fired_F.long(), encoded.smallest_score),
        Parts(code, order, pairs, read_BKD, decoded.residual_BKD, x_sum_KD),
        db_enc_F=pairs.db_enc_F,
        db_dec_KD=decoded.residual_BKD.sum(dim=0) * (2 / terms),
        dlog_threshold_F=dlog_threshold_F,
    )


@dataclass(frozen=True)
class TokenSample:
    """The tokens over which the thresholds' gradient is summed."""

    tokens: Tensor | None
    """(n,) int64 on the device; None: all."""
    factor: float
    """That makes the sum unbiased."""

    @classmethod
    def draw(cls, config: CrosscoderConfig, gate: Gate, settings: LossSettings, x_BKD: Tensor) -> TokenSample | None:
        """None where no gradient is summed over tokens: the window's pairs are in the code, or there are none."""
        if not gate.learned or gate.window or not len(x_BKD):
            return None
        if config.threshold_mode != "sampled":
            return cls(None, 1.0)
        tokens, factor = sample_tokens(len(x_BKD), config.threshold_sample, settings.generator)
        return cls(sent(tokens, x_BKD.device), factor)


class TritonTraining:
    """A step's update on the device; nothing here waits for it."""

    def __init__(self, backend: TritonBackend, weights: Weights, state: AdamState) -> None:
        self.dense_above = DENSE_ABOVE[weights.W_enc.dtype]
        self.state = state
        self._backend = backend
        self._rows: DerivedRows
        """Of the step under way."""

    def input(self, weights: Weights, x_BKD: Tensor) -> Tensor:
        """On the weights' device, in its own dtype up to float32."""
        weights.check(x_BKD)
        if x_BKD.dtype == torch.float64:
            x_BKD = x_BKD.float()
        self._refresh(weights)
        return x_BKD.to(weights.W_enc.device, non_blocking=True).contiguous()

    def _refresh(self, weights: Weights) -> None:
        self._rows = self._backend.rows(weights)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Nothing."""
        return iter(())

    def tile(self, n_tokens: int) -> int:
        _, K, D = self.state["W_enc"]["m"].shape
        return max(1, min(DENSE_TILE_BYTES // (4 * max(1, n_tokens)), DENSE_ROWS_BYTES // (4 * K * D)))

    def sparse_pass(
        self, weights: Weights, x_BKD: Tensor, settings: StepSettings, max_density: float, room: Room | None
    ) -> SparsePass | None:
        assert room is not None, "the host runs ahead: it is the engine that knows how many pairs fit"
        self._refresh(weights)
        return sparse_pass(weights, x_BKD, self._rows, settings.loss(), room)

    def squares(self, weights: Weights, batch: SparsePass) -> Tensor:
        out = torch.empty_like(self._rows.squares)
        # A feature that did not fire has no gradient, unless all have one.
        _launch_rows(NORMS, weights, self._rows, batch.parts, squares=out, skip=batch.parts.x_sum_KD is None)
        return out.sum(dtype=torch.float64)

    def update(self, weights: Weights, batch: SparsePass, update: Update) -> None:
        _launch_rows(ADAM, weights, self._rows, batch.parts, update=update, state=self.state)

    def update_tile(
        self, weights: Weights, features: slice, gradients: Gradients, fired_F: Tensor, update: Update
    ) -> None:
        _launch_rows(
            ADAM, weights, self._rows, None, (gradients.W_enc, gradients.W_dec), update=update, state=self.state,
            fired_F=fired_F.int(), first=features.start,
        )  # fmt: skip

    def finish(self, weights: Weights, db_enc_F: Tensor, fired_F: Tensor, update: Update) -> None:
        """The decoders' limit, b_enc, and when each row was last updated."""
        rows, allowed = self._rows, update.allowed
        assert allowed is not None
        F, K, D = weights.W_enc.shape
        if update.norm_limit is not None:
            limit_rows[(F,)](
                W_dec_ptr=weights.W_dec, squares_ptr=rows.squares, allowed_ptr=allowed, limit=update.norm_limit, K=K,
                D=D, blocks=rows.squares.shape[2], seed=short_seed(update.settings.seed),
                BF16=weights.W_dec.dtype == torch.bfloat16, BLOCKS=power_of_two(rows.squares.shape[2]), LANES=LANES,
                num_warps=1,
            )  # fmt: skip
        skip = update.lazy and not update.everywhere
        self._vector(weights, "b_enc", db_enc_F, update.settings.lr, update, fired_F.int(), skip=skip, lazy=update.lazy)
        touched_F = (allowed != 0).expand(F)
        if skip:
            touched_F = touched_F & (fired_F > 0)
        self.state.last_step_F.masked_fill_(touched_F, update.t)
        weights.written()
        rows.current(weights)

    def update_vector(self, weights: Weights, name: str, gradient: Tensor, lr: float, update: Update) -> None:
        self._vector(weights, name, gradient, lr, update, self.state.last_step_F)

    def _vector(
        self, weights: Weights, name: str, gradient: Tensor, lr: float, update: Update, fired_F: Tensor,
        *, skip: bool = False, lazy: bool = False,
    ) -> None:  # fmt: skip
        parameter, moments = getattr(weights, name), self.state[name]
        clip = update.allowed if update.factor is None else update.factor.float()
        adam_vector[(triton.cdiv(parameter.numel(), 256),)](
            w_ptr=parameter, m_ptr=moments["m"], v_ptr=moments["v"], g_ptr=gradient, fired_ptr=fired_F,
            last_step_ptr=self.state.last_step_F, allowed_ptr=update.allowed, clip_ptr=clip, n=parameter.numel(),
            **AdamScalars(lr, update.t).vector(), step=update.t, SKIP=skip, LAZY=lazy,
            CLIP=update.factor is not None, BLOCK=256, num_warps=4,
        )  # fmt: skip


def _launch_rows(
    what: int,
    weights: Weights,
    rows: DerivedRows,
    parts: Parts | None,
    dense: tuple[Tensor, Tensor] | None = None,
    *,
    squares: Tensor | None = None,
    skip: bool = False,
    update: Update | None = None,
    state: AdamState | None = None,
    fired_F: Tensor | None = None,
    first: int = 0,
) -> None:
    """`update_rows` for all features from `parts`, or for some from `first` on from gradients that are there.

    GRADIENT writes to `dense`, NORMS to `squares`, ADAM changes weights, moments and `rows` as `update` says.
    """
    F, K, D = weights.W_enc.shape
    unused, blocks = rows.squares, rows.squares.shape[2]
    pairs = None if parts is None else parts.pairs
    fired_F = fired_F if pairs is None else pairs.fired_F
    moments = {}
    for short, name in (("enc", "W_enc"), ("dec", "W_dec")):
        kept = {} if state is None else state[name]
        for key in ("m", "v", "m_scale", "v_scale"):
            moments[f"{short}_{key}_ptr"] = kept.get(key, unused)
    clip = unused if update is None or update.factor is None else update.factor.float()
    allowed = torch.ones(1, dtype=torch.int32, device=rows.device) if update is None else update.allowed
    n_rows = F if parts is not None or dense is None else len(dense[0])
    together = blocks if parts is None else span(len(parts.read_BKD), D, parts.read_BKD.element_size())
    eight_bit = state is not None and "m_scale" in state["W_enc"]
    scalars = AdamScalars(0.0, 1) if update is None else AdamScalars(update.settings.lr, update.t)
    update_rows[(n_rows, triton.cdiv(blocks, together), K)](
        offsets_ptr=unused if parts is None else parts.order.feature_offsets,
        tokens_ptr=unused if parts is None else parts.order.tokens,
        dh_ptr=unused if pairs is None else pairs.dh_N,
        values_ptr=unused if pairs is None else pairs.values_N,
        gates_ptr=unused if pairs is None else pairs.gates_N,
        x_ptr=unused if parts is None else parts.read_BKD,
        residual_ptr=unused if parts is None else parts.residual_BKD,
        dense_enc_ptr=unused if dense is None else dense[0],
        dense_dec_ptr=unused if dense is None else dense[1],
        first=first,
        pull_ptr=unused if pairs is None else pairs.pull_FK,
        lift_ptr=unused if pairs is None or pairs.lift_F is None else pairs.lift_F,
        x_sum_ptr=unused if parts is None or parts.x_sum_KD is None else parts.x_sum_KD,
        fired_ptr=fired_F,
        last_step_ptr=unused if state is None else state.last_step_F,
        allowed_ptr=allowed,
        clip_ptr=clip,
        W_enc_ptr=weights.W_enc,
        W_dec_ptr=weights.W_dec,
        **moments,
        shadow_ptr=rows.bf16(weights),
        fourth_ptr=rows.fourth,
        squares_ptr=rows.squares if squares is None else squares,
        K=K,
        D=D,
        blocks=blocks,
        scale=1.0 if parts is None else 2 / max(1, len(parts.read_BKD) * K),
        **scalars.rows(eight_bit=eight_bit),
        step=scalars.step,
        seed=0 if update is None else short_seed(update.settings.seed),
        WHAT=what,
        DENSE=parts is None,
        SKIP=skip if update is None else update.lazy and not update.everywhere,
        LAZY=update is not None and update.lazy,
        LIFT=parts is not None and parts.x_sum_KD is not None,
        CLIP=update is not None and update.factor is not None,
        EIGHT_BIT=eight_bit,
        BF16=weights.W_enc.dtype == torch.bfloat16,
        SHADOW=rows.shadow is not None,
        EVEN=D % LANES == 0,
        PAIRS=PAIRS,
        SPAN=together,
        LANES=LANES,
        num_warps=1,
        maxnreg=ROW_REGISTERS if eight_bit else None,
    )


def short_seed(seed: int) -> int:
    """A step's seed in 31 bits: what a kernel takes."""
    return (seed ^ (seed >> 31) * 0x9E3779B1) & 0x7FFFFFFF
