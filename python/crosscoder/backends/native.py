"""C++ on a CPU: one reduced-precision product, then only the pairs that are on.

Letters: B tokens, K snapshots, D width of one activation, F features, N pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosscoder import _core
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
from crosscoder.backends.recall import REQUIRED_RECALL, TOKENS, RecallAudit
from crosscoder.backends.reference import TorchVectors
from crosscoder.code import SparseCode
from crosscoder.config import TrainConfig
from crosscoder.gate import Gate
from crosscoder.kernels.arrays import array, arrays, code_arrays, n_threads
from crosscoder.kernels.batch import column_sums, mix_snapshots
from crosscoder.kernels.decode import native as decode_native
from crosscoder.kernels.encode import native as encode_native
from crosscoder.kernels.encode.products import prepare
from crosscoder.kernels.encode.rows import EncoderRows, Products, column_scale, default_products
from crosscoder.kernels.scratch import NoScratch, Scratch
from crosscoder.kernels.threshold.native import threshold_gradient
from crosscoder.kernels.threshold.reference import sample_tokens
from crosscoder.kernels.transpose.native import order_arrays, transpose
from crosscoder.kernels.update.native import (
    AdamOptions,
    GradientParts,
    gradient_rows,
    gradient_squares,
    update_dense_rows,
    update_rows,
)
from crosscoder.kernels.update.reference import BETA1, BETA2, EPSILON
from crosscoder.parameters import Weights
from crosscoder.penalty import LossSettings, LossTerms, Penalty
from crosscoder.progress import warn
from crosscoder.sharding import ONE_PROCESS, Sharding

DENSE_ABOVE = 0.3
"""Density (share of all pairs of token and feature) above which the dense way is faster: docs/performance.md."""
DENSE_TILE = 1024


class NativeBackend(Backend):
    """Keeps decoder norms, encoder norms and the copies of W_enc that its products multiply, by the products' type."""

    name = "native"
    candidates = ("exact", "int8")

    def __init__(self) -> None:
        self._rows: dict[str, EncoderRows] = {}

    @classmethod
    def fits(cls, weights: Weights) -> str | None:
        """float32 or bfloat16 on a CPU."""
        W = weights.W_enc
        if W.dtype in (torch.float32, torch.bfloat16) and W.device.type == "cpu":
            return None
        return f"needs float32 or bfloat16 weights on a CPU, not {W.dtype} on {W.device}"

    def rows(self, weights: Weights, products: Products | None = None, scale: Tensor | None = None) -> EncoderRows:
        """What is derived from the weights, up to date.

        `products`: the type of the encoder's products, None for this machine's fastest without a loss; `scale` (K D)
        is int8's (`column_scale`).
        """
        wanted = products or default_products()
        rows = self._rows.get(wanted)
        if rows is None or not rows.fit(weights.W_enc):
            rows = self._rows[wanted] = EncoderRows(weights.W_enc, weights.W_dec, wanted)
        if scale is not None:
            rows.set_column_scale(scale)
        rows.refresh(weights)
        return rows

    def encode(
        self, weights: Weights, x_BKD: Tensor, candidates: str = "exact", products: Products | None = None
    ) -> SparseCode:
        """The code of a batch in float32."""
        products = "int8" if candidates == "int8" else products
        rows, scratch = self.rows(weights, products), NoScratch()
        x_BC = _encoder_input(weights, x_BKD, scratch).flatten(1)
        if rows.unscaled() and len(x_BC):
            rows = self.rows(weights, products, column_scale(x_BC))
        norms_FK = rows.norms_FK * weights.snapshot_scale
        batch = prepare(x_BC, rows, scratch)
        code, _ = encode_native.encode(batch, weights, norms_FK, weights.gate, rows, scratch)
        assert code is not None
        return code

    def decode(self, weights: Weights, code: SparseCode) -> Tensor:
        """The reconstruction (B, K, D) float32."""
        return decode_native.decode(code, weights.W_dec, weights.b_dec.float())

    def loss(self, weights: Weights, x_BKD: Tensor, settings: LossSettings) -> LossTerms:
        """From the sparse code."""
        return differentiable(self, weights, x_BKD, settings)

    @torch.no_grad()
    def sparse_pass(
        self, weights: Weights, x_BKD: Tensor, settings: LossSettings, *, sharding: Sharding = ONE_PROCESS
    ) -> SparsePass:
        """Loss and gradients of a batch in float32."""
        batch = sparse_pass(weights, x_BKD, self.rows(weights), NoScratch(), settings, sharding=sharding)
        assert batch is not None
        return batch

    def gradients(self, weights: Weights, batch: SparsePass) -> tuple[Tensor, Tensor]:
        """dW_enc and dW_dec."""
        return gradient_rows(batch.parts, weights.W_dec)

    def training(self, weights: Weights, config: TrainConfig, state: AdamState) -> Training:
        """Sparse steps, dense ones in torch."""
        return NativeTraining(self, weights, config, state)


def _encoder_input(weights: Weights, x_BKD: Tensor, scratch: Scratch) -> Tensor:
    """`Weights.encoder_input` in C++, contiguous; in `scratch` where it is not `x_BKD` itself."""
    x_BKD = x_BKD.contiguous()
    if weights.snapshot_mix is None:
        return x_BKD
    return mix_snapshots(weights.snapshot_mix.float(), x_BKD, scratch.take("mixed", tuple(x_BKD.shape)))


@torch.no_grad()
def sparse_pass(
    weights: Weights,
    x_BKD: Tensor,
    rows: EncoderRows,
    scratch: Scratch,
    settings: LossSettings,
    *,
    max_density: float | None = None,
    sharding: Sharding = ONE_PROCESS,
) -> SparsePass | None:
    """Loss and gradients of a batch (B, K, D) in float32; None if it is denser than `max_density`.

    The residual lies in `scratch`.
    """
    config, penalty = weights.config, Penalty.of(weights.config)
    gate = Gate.for_loss(config, training=weights.training, above=settings.preactivation_coefficient > 0)
    B, K, D = x_BKD.shape
    terms = max(1, B * K)
    norms_FK, theta_F = rows.norms_FK, weights.theta(gate)
    x_BKD = x_BKD.contiguous()
    read_BKD = _encoder_input(weights, x_BKD, scratch)
    batch = prepare(read_BKD.flatten(1), rows, scratch)
    code, smallest = encode_native.encode(batch, weights, norms_FK, gate, rows, scratch, max_density)
    if code is None:
        return None
    order = transpose(code)
    activity_F, slope_FK, fired_F, open_K, above_F, n_above_F = _feature_sums(code, order, norms_FK, theta_F, penalty)
    p_F = activity_F / terms
    weight_F = settings.sparsity_coefficient * penalty.total_slope(p_F) / terms
    decoded = decode_native.residual_and_pairs(
        code,
        weights.W_dec,
        weights.b_dec.float(),
        x_BKD,
        weight_F=weight_F,
        norms_FK=norms_FK,
        theta_F=theta_F,
        penalty=penalty,
        gate=gate,
        scratch=scratch,
        sharding=sharding,
    )
    dnorm_FK = weight_F[:, None] * slope_FK
    dlog_threshold_F = torch.zeros_like(theta_F)
    if decoded.dlog_threshold_N is not None:
        by_feature = decoded.dlog_threshold_N[order.order]
        dlog_threshold_F = torch.segment_reduce(by_feature, "sum", offsets=order.feature_offsets)
    elif gate.learned:
        tokens, factor = None, 1.0
        if config.threshold_mode == "sampled":
            tokens, factor = sample_tokens(B, config.threshold_sample, settings.generator)
        # The exact mode is exact; a sample's noise is far above bf16's rounding.
        sampled_dtype = torch.float32 if rows.products == "fp32" else torch.bfloat16
        dlog_threshold_F = factor * threshold_gradient(
            read_BKD,
            decoded.residual_BKD,
            code,
            order,
            weights.W_enc.detach(),
            weights.b_enc.detach().float(),
            weights.W_dec.detach(),
            tokens=tokens,
            dtype=torch.float32 if tokens is None else sampled_dtype,
            weight_F=weight_F,
            norms_FK=norms_FK,
            theta_F=theta_F,
            penalty=penalty,
            gate=gate,
            window=config.threshold_window,
        )

    # Sums in float64 and in an order that does not depend on threads: numpy's.
    reconstruction = float(decoded.error_BK.numpy().sum(dtype=np.float64)) / terms
    sparsity = settings.sparsity_coefficient * float(penalty.total(p_F.double().numpy()))
    preactivation = 0.0
    every_F = x_sum_KD = None
    if settings.preactivation_coefficient:
        weight = settings.preactivation_coefficient / terms
        x_sum_KD = column_sums(read_BKD.flatten(1)).view(K, D)
        norm_sum_F = norms_FK.sum(dim=1)
        gap_F = B * theta_F - weights.score_sums(x_sum_KD, B) - above_F
        every_F = -weight * norm_sum_F
        dnorm_FK = dnorm_FK + weight * gap_F[:, None]
        dlog_threshold_F = dlog_threshold_F + (weight * theta_F * norm_sum_F) * (B - n_above_F)
        preactivation = weight * float(np.dot(gap_F.double().numpy(), norm_sum_F.double().numpy()))
    parts = GradientParts(
        code=code,
        order=order,
        dh_N=decoded.dh_N,
        x_BKD=read_BKD,
        residual_BKD=decoded.residual_BKD,
        residual_scale=2 / terms,
        dnorm_FK=dnorm_FK,
        norms_FK=norms_FK,
        theta_F=theta_F,
        every_F=every_F,
        x_sum_KD=x_sum_KD,
    )
    losses = (reconstruction + sparsity + preactivation, reconstruction, sparsity, preactivation)
    loss = LossTerms(*(torch.tensor(value, dtype=torch.float32) for value in losses))
    return SparsePass(
        StepStatistics(loss, decoded.residual_BKD, open_K, fired_F, smallest),
        parts,
        db_enc_F=parts.encoder_bias(),
        db_dec_KD=column_sums(decoded.residual_BKD.flatten(1)).view(K, D) * (2 / terms),
        dlog_threshold_F=dlog_threshold_F,
    )


def _feature_sums(code: SparseCode, order: Any, norms_FK: Tensor, theta_F: Tensor, penalty: Penalty) -> list[Tensor]:
    of_features = arrays(norms_FK, theta_F)
    options = decode_native.penalty_arguments(penalty)
    found = _core.feature_sums(code_arrays(code), order_arrays(order), *of_features, options, n_threads())
    return [torch.from_numpy(values) for values in found]


class NativeTraining(TorchVectors):
    """A step's update feature by feature in C++; and int8 candidates, audited.

    Above `dense_above` a step goes the dense way, in torch's products with the same update.
    """

    def __init__(self, backend: NativeBackend, weights: Weights, config: TrainConfig, state: AdamState) -> None:
        super().__init__(state)
        self.dense_above = DENSE_ABOVE
        self._backend = backend
        self._int8 = config.candidates == "int8"
        self._audit = RecallAudit()
        self._scratch = Scratch()
        self._column_scale = torch.zeros(weights.config.n_snapshots * weights.config.d_model, dtype=torch.float32)
        """Of int8 products, from the first batch; 0 before."""
        self._rows = backend.rows(weights, "int8" if self._int8 else None)
        for tensor in (weights.W_enc, weights.W_dec, *(tensor for _, tensor in state.tensors())):
            _core.prefer_huge_pages(array(tensor))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The int8 candidates' scale and audit."""
        if self._int8:
            yield "int8_column_scale", self._column_scale
            yield "int8_audit", self._audit.tally

    def input(self, weights: Weights, x_BKD: Tensor) -> Tensor:
        """In float32. What is derived from the weights is brought up to date here, for the dense way too: its update
        refreshes only the rows that it changes."""
        x_BKD = super().input(weights, x_BKD)
        self._rows = self._current_rows(weights, x_BKD)
        return x_BKD

    def tile(self, n_tokens: int) -> int:
        return DENSE_TILE

    def sparse_pass(
        self, weights: Weights, x_BKD: Tensor, settings: StepSettings, max_density: float, room: Room | None
    ) -> SparsePass | None:
        batch = sparse_pass(weights, x_BKD, self._rows, self._scratch, settings.loss(), max_density=max_density)
        if batch is None or not self._int8:
            return batch
        if self._rows.products == "int8" and self._audit.due(settings.number):
            self._check_recall(weights, x_BKD, batch)
        recalled = StepStatistics(**{**vars(batch.statistics), "candidate_recall": self._audit.recall()})
        return SparsePass(**{**vars(batch), "statistics": recalled})

    def _current_rows(self, weights: Weights, x_BKD: Tensor) -> EncoderRows:
        """What the encoder needs beside the weights, up to date."""
        if not self._int8 or self._audit.given_up:
            return self._backend.rows(weights)
        if not bool(self._column_scale.any()) and len(x_BKD):
            self._column_scale.copy_(column_scale(weights.encoder_input(x_BKD).flatten(1)))
        return self._backend.rows(weights, "int8", self._column_scale)

    def _check_recall(self, weights: Weights, x_BKD: Tensor, batch: SparsePass) -> None:
        code: SparseCode = batch.parts.code
        level = batch.statistics.smallest_score
        if level is not None:  # BatchTopK: what is on depends on all tokens, but it is all above this
            if code.n_pairs < weights.gate.top_k * len(x_BKD):
                level = torch.zeros_like(level)  # all that is positive should have been found
            weights = dataclasses.replace(weights, training=False, batch_threshold=level)
        exact = self._backend.encode(weights, x_BKD[:TOKENS], products="fp32")
        if self._audit.add(code, exact):
            warn(
                f"int8 candidates find only {float(self._audit.recall()):.5f} of the active pairs, fewer than "
                f"{REQUIRED_RECALL}; going on with exact ones, which is slower"
            )

    def squares(self, weights: Weights, batch: SparsePass) -> Tensor:
        return gradient_squares(batch.parts, weights.W_dec).double().sum()

    def update(self, weights: Weights, batch: SparsePass, update: Update) -> None:
        options = self._options(update)
        update_rows(batch.parts, batch.db_enc_F, weights.W_enc, weights.W_dec, weights.b_enc, self.state, self._rows,
                    options)  # fmt: skip

    def update_tile(
        self, weights: Weights, features: slice, gradients: Gradients, fired_F: Tensor, update: Update
    ) -> None:
        touched_T = fired_F[features] > 0
        if update.everywhere:
            touched_T = torch.ones_like(touched_T)
        update_dense_rows(
            gradients.W_enc, gradients.W_dec, gradients.b_enc, touched_T, features.start, weights.W_enc, weights.W_dec,
            weights.b_enc, self.state, self._rows, self._options(update),
        )  # fmt: skip

    def finish(self, weights: Weights, db_enc_F: Tensor, fired_F: Tensor, update: Update) -> None:
        """The core wrote weights and rows together."""
        weights.written()
        self._rows.current(weights)

    def _options(self, update: Update) -> AdamOptions:
        return AdamOptions(
            lr=update.settings.lr,
            betas=(BETA1, BETA2),
            epsilon=EPSILON,
            t=update.t,
            lazy=update.lazy,
            gradient_factor=update.scale,
            norm_limit=update.norm_limit,
            seed=update.settings.seed,
        )
