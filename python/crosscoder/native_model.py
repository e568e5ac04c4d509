"""A crosscoder's code, reconstruction and loss on a CPU, from the C++ operations.

`sparse_pass` is the training step up to the update: what `Crosscoder.loss` differentiates and what the native engine
trains with.

Letters: B tokens, K snapshots, D width of one activation, F features, N pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from crosscoder import _core
from crosscoder.code import SparseCode
from crosscoder.kernels.arrays import array, code_arrays, n_threads
from crosscoder.kernels.batch import column_sums, mix_snapshots
from crosscoder.kernels.decode import native as decode_native
from crosscoder.kernels.encode import native as encode_native
from crosscoder.kernels.encode.products import Batch, prepare
from crosscoder.kernels.encode.rows import EncoderRows, Products, column_scale, default_products
from crosscoder.kernels.scratch import NoScratch, Scratch
from crosscoder.kernels.threshold.native import threshold_gradient
from crosscoder.kernels.threshold.reference import sample_tokens
from crosscoder.kernels.transpose.native import transpose
from crosscoder.kernels.update.native import GradientParts, gradient_rows
from crosscoder.penalty import LossTerms, Penalty

if TYPE_CHECKING:
    from crosscoder.model import Crosscoder


def rows_of(model: Crosscoder, products: Products | None = None, scale: Tensor | None = None) -> EncoderRows:
    """What is derived from the model's weights, up to date; kept with the model.

    `products`: the type of the encoder's products, None for this machine's fastest without a loss; `scale` (K D) is
    int8's (`EncoderRows.column_scale`).
    """
    wanted = products or default_products()
    rows = model.derived_rows.get(wanted)
    shape = (model.config.n_features, model.config.n_snapshots, model.config.d_model)
    if rows is None or rows.shape != shape or rows.dtype != model.W_enc.dtype:
        rows = model.derived_rows[wanted] = EncoderRows(model.W_enc, model.W_dec, wanted)
    if scale is not None:
        rows.set_column_scale(scale)
    rows.refresh(model.W_enc, model.W_dec)
    return rows


def encoder_input(model: Crosscoder, x_BKD: Tensor, scratch: Scratch) -> Tensor:
    """`Crosscoder.encoder_input` in C++, contiguous; in `scratch` where it is not `x_BKD` itself."""
    x_BKD = x_BKD.contiguous()
    if not model.is_mixed:
        return x_BKD
    return mix_snapshots(model.snapshot_mix.float(), x_BKD, scratch.take("mixed", tuple(x_BKD.shape)))


def encode(model: Crosscoder, x_BKD: Tensor, products: Products | None = None) -> SparseCode:
    """The code of a batch (B, K, D) in float32."""
    rows = rows_of(model, products)
    scratch = NoScratch()
    x_BC = encoder_input(model, x_BKD, scratch).flatten(1)
    if rows.unscaled() and len(x_BC):
        rows = rows_of(model, products, column_scale(x_BC))
    batch = prepare(x_BC, rows, scratch)
    code, _ = _code_of(model, batch, rows, rows.norms_FK * model.snapshot_scale, scratch)
    return cast(SparseCode, code)


def _code_of(
    model: Crosscoder,
    batch: Batch,
    rows: EncoderRows,
    norms_FK: Tensor,
    scratch: Scratch,
    *,
    window: float = 0.0,
    also_above: bool = False,
    max_density: float | None = None,
) -> tuple[SparseCode | None, Tensor | None]:
    config, bias_F = model.config, model.b_enc.float()
    theta_F, shared = model.threshold.float(), config.gate == "shared"
    if config.gate == "topk" or (config.gate == "batchtopk" and model.training):
        whole_batch = config.gate == "batchtopk"
        code, smallest = encode_native.encode_ranked(
            batch, model.W_enc, bias_F, norms_FK, rows, scratch, cast(int, config.top_k), whole_batch=whole_batch
        )
        return code, smallest if whole_batch else None
    if config.gate == "batchtopk":  # inference: h max_k n over one threshold, at all snapshots
        norms_FK = norms_FK.amax(dim=1, keepdim=True).expand_as(norms_FK).contiguous()
        theta_F, shared = model.batch_threshold.float().expand(config.n_features).contiguous(), False
    code_or_none = encode_native.encode(
        batch,
        model.W_enc,
        bias_F,
        norms_FK,
        theta_F,
        rows,
        scratch,
        shared=shared,
        window=window,
        also_above_threshold=also_above,
        max_density=max_density,
    )
    return code_or_none, None


def decode(model: Crosscoder, code: SparseCode) -> Tensor:
    """The reconstruction (B, K, D) float32."""
    return decode_native.decode(code, model.W_dec, model.b_dec.float())


@dataclass(frozen=True)
class SparsePass:
    """One batch: its loss, and everything that its gradients are made of."""

    loss: LossTerms
    parts: GradientParts
    open_K: Tensor
    fired_F: Tensor
    smallest_score: Tensor | None
    db_dec_KD: Tensor
    dlog_threshold_F: Tensor


@torch.no_grad()
def sparse_pass(
    model: Crosscoder,
    x_BKD: Tensor,
    rows: EncoderRows,
    scratch: Scratch,
    *,
    sparsity_coefficient: float,
    preactivation_coefficient: float,
    generator: torch.Generator | None,
    max_density: float | None,
) -> SparsePass | None:
    """Loss and gradients of a batch (B, K, D) in float32; None if it is denser than `max_density` (`encode`).

    The residual lies in `scratch`.
    """
    config, penalty = model.config, Penalty.of(model.config)
    B, K, D = x_BKD.shape
    terms = max(1, B * K)
    shared = config.gate == "shared"
    window = config.threshold_window if config.threshold_mode == "narrow" and not config.selects_by_rank else 0.0
    norms_FK, theta_F = rows.norms_FK, model.threshold.float()
    x_BKD = x_BKD.contiguous()
    read_BKD = encoder_input(model, x_BKD, scratch)
    batch = prepare(read_BKD.flatten(1), rows, scratch)
    code, smallest = _code_of(
        model,
        batch,
        rows,
        norms_FK,
        scratch,
        window=window,
        also_above=preactivation_coefficient > 0,
        max_density=max_density,
    )
    if code is None:
        return None
    order = transpose(code)
    activity_F, slope_FK, fired_F, open_K, above_F, n_above_F = _feature_sums(code, order, norms_FK, theta_F, penalty)
    p_F = activity_F / terms
    weight_F = sparsity_coefficient * penalty.total_slope(p_F) / terms
    decoded = decode_native.decode_with_gradients(
        code,
        model.W_dec,
        model.b_dec.float(),
        x_BKD,
        weight_F=weight_F,
        norms_FK=norms_FK,
        theta_F=theta_F,
        penalty=penalty,
        shared=shared,
        window=window,
        scratch=scratch,
    )
    dnorm_FK = weight_F[:, None] * slope_FK
    dlog_threshold_F = torch.zeros_like(theta_F)
    if decoded.dlog_threshold_N is not None:
        by_feature = decoded.dlog_threshold_N[order.order]
        dlog_threshold_F = torch.segment_reduce(by_feature, "sum", offsets=order.feature_offsets)
    elif not config.selects_by_rank:
        tokens, factor = None, 1.0
        if config.threshold_mode == "sampled":
            tokens, factor = sample_tokens(B, config.threshold_sample, generator)
        # The exact mode is exact; a sample's noise is far above bf16's rounding.
        sampled_dtype = torch.float32 if rows.products == "fp32" else torch.bfloat16
        dlog_threshold_F = factor * threshold_gradient(
            read_BKD,
            decoded.residual_BKD,
            code,
            order,
            model.W_enc.detach(),
            model.b_enc.float(),
            model.W_dec.detach(),
            tokens=tokens,
            dtype=torch.float32 if tokens is None else sampled_dtype,
            weight_F=weight_F,
            norms_FK=norms_FK,
            theta_F=theta_F,
            penalty=penalty,
            shared=shared,
            window=config.threshold_window,
        )

    reconstruction = float(decoded.error_BK.numpy().sum(dtype=np.float64)) / terms
    sparsity = sparsity_coefficient * _total(penalty, p_F)
    preactivation = 0.0
    every_F = x_sum_KD = None
    if preactivation_coefficient:
        weight = preactivation_coefficient / terms
        x_sum_KD = column_sums(read_BKD.flatten(1)).view(K, D)
        norm_sum_F = norms_FK.sum(dim=1)
        h_sum_F = _rows_times(model.W_enc, x_sum_KD) + B * model.b_enc.float()
        gap_F = B * theta_F - h_sum_F - above_F
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
    return SparsePass(
        loss=LossTerms(*(torch.tensor(value) for value in losses)),
        parts=parts,
        open_K=open_K,
        fired_F=fired_F,
        smallest_score=smallest,
        db_dec_KD=column_sums(decoded.residual_BKD.flatten(1)).view(K, D) * (2 / terms),
        dlog_threshold_F=dlog_threshold_F,
    )


def _feature_sums(code: SparseCode, order: Any, norms_FK: Tensor, theta_F: Tensor, penalty: Penalty) -> list[Tensor]:
    arrays = _core.feature_sums(
        code_arrays(code),
        (array(order.feature_offsets), array(order.tokens), array(order.order)),
        array(norms_FK),
        array(theta_F),
        decode_native.penalty_arguments(penalty, False, 0.0),
        n_threads(),
    )
    return [torch.from_numpy(values) for values in arrays]


def _total(penalty: Penalty, p_F: Tensor) -> float:
    """`Penalty.total`, summed in float64 in an order that does not depend on threads."""
    p = p_F.double().numpy()
    return float((p * (1 + p / penalty.frequency_scale)).sum() if penalty.kind == "tanh-quad" else p.sum())


def _rows_times(W_FKD: Tensor, vector_KD: Tensor) -> Tensor:
    """W @ vector (F,) in float32, without a float32 copy of bf16 weights."""
    parts = [some.flatten(1).float() @ vector_KD.flatten() for some in torch.split(W_FKD.detach(), 1024)]
    return torch.cat(parts)


def loss(
    model: Crosscoder,
    x_BKD: Tensor,
    sparsity_coefficient: float,
    preactivation_coefficient: float,
    generator: torch.Generator | None,
) -> LossTerms:
    """`Crosscoder.loss` from the sparse code: `total` has a gradient in the parameters."""
    result = sparse_pass(
        model,
        x_BKD,
        rows_of(model),
        NoScratch(),
        sparsity_coefficient=sparsity_coefficient,
        preactivation_coefficient=preactivation_coefficient,
        generator=generator,
        max_density=None,
    )
    assert result is not None
    if result.smallest_score is not None:
        model.update_batch_threshold(result.smallest_score)
    parameters = (model.W_enc, model.W_dec, model.b_enc, model.b_dec, model.log_threshold)
    total = _Loss.apply(model, result, *parameters)  # type: ignore[no-untyped-call]
    return LossTerms(total, result.loss.reconstruction, result.loss.sparsity, result.loss.preactivation)


class _Loss(torch.autograd.Function):
    """The loss of a `SparsePass`, whose gradients are made when they are asked for."""

    @staticmethod
    def forward(ctx: Any, model: Crosscoder, result: SparsePass, *parameters: Tensor) -> Tensor:
        ctx.model, ctx.result = model, result
        ctx.save_for_backward(*parameters)  # so that a change in between is an error, as everywhere in autograd
        return result.loss.total.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        result: SparsePass = ctx.result
        ctx.model.weights_changed()  # they are about to
        parameters = ctx.saved_tensors
        dW_enc, dW_dec = gradient_rows(result.parts, parameters[1])
        gradients = (dW_enc, dW_dec, result.parts.encoder_bias(), result.db_dec_KD, result.dlog_threshold_F)
        return (
            None,
            None,
            *(
                (g * gradient).to(p.dtype) if needed else None
                for g, p, needed in zip(gradients, parameters, ctx.needs_input_grad[2:], strict=True)
            ),
        )
