"""Encode on a CPU: candidates from reduced-precision products, tile by tile in the cache, then exact h for them.

The code is that of float32 arithmetic whatever the products' type (but for int8, whose recall is measured).
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder import _core
from crosscoder.code import SparseCode
from crosscoder.gate import Gate
from crosscoder.kernels.arrays import array, arrays, n_threads
from crosscoder.kernels.encode.products import Batch, tiles
from crosscoder.kernels.encode.rows import EncoderRows
from crosscoder.kernels.scratch import Scratch
from crosscoder.parameters import Weights

SLACK = 1e-6
"""Relative rounding of the cut itself."""


def encode(
    batch: Batch,
    weights: Weights,
    norms_FK: Tensor,
    gate: Gate,
    rows: EncoderRows,
    scratch: Scratch,
    max_density: float | None = None,
) -> tuple[SparseCode | None, Tensor | None]:
    """The pairs that `gate` lists, and for BatchTopK in training the smallest score kept, ().

    The code is None as soon as more than `max_density` of the pairs of all tokens with the features seen so far are in
    it; gates by rank have no such bound.
    """
    W_enc_FKD, b_enc_F = weights.W_enc.detach(), weights.b_enc.detach().float()
    if gate.ranked:
        code, smallest = _encode_ranked(batch, W_enc_FKD, b_enc_F, norms_FK, gate, rows, scratch)
        return code, smallest if gate.whole_batch else None
    theta_F, scale_F = weights.theta(gate), gate.scale(norms_FK)
    cut_F = gate.cut(theta_F, scale_F).clamp_min(0)
    cut_F -= SLACK * cut_F + b_enc_F
    cut_F -= batch.relative * cut_F.abs() + SLACK * b_enc_F.abs()
    rule = batch.rule(cut_F, rows)
    level_F = theta_F - gate.window / 2
    keep = arrays(scale_F, level_F, theta_F if gate.above else None)
    encoder = _core.Encoder(*arrays(batch.x_BC, W_enc_FKD.flatten(1), b_enc_F))
    for first, products in tiles(batch, W_enc_FKD, rows, scratch):
        n_pairs = encoder.add(array(products), first, rule, *keep, n_threads())
        n_seen = len(batch.x_BC) * (first + products.shape[1])
        if max_density is not None and n_pairs > max_density * n_seen:
            return None, None
    units_FK = norms_FK if gate.shared else gate.units(norms_FK).contiguous()
    found = encoder.finish(*arrays(units_FK, theta_F), gate.shared, n_threads())
    row_offsets, features, values, gates = map(torch.from_numpy, found)
    return SparseCode(row_offsets, features, values, gates, norms_FK.shape[1], len(theta_F)), None


def _encode_ranked(
    batch: Batch,
    W_enc_FKD: Tensor,
    b_enc_F: Tensor,
    norms_FK: Tensor,
    gate: Gate,
    rows: EncoderRows,
    scratch: Scratch,
) -> tuple[SparseCode, Tensor]:
    """The pairs of a gate by rank, and the smallest score kept, ()."""
    largest_F = gate.scale(norms_FK)
    inputs = arrays(batch.x_BC, W_enc_FKD.flatten(1), b_enc_F, largest_F)
    encoder = _core.RankEncoder(*inputs, gate.top_k, whole_batch=gate.whole_batch)
    rule = batch.rule(None, rows)
    for first, products in tiles(batch, W_enc_FKD, rows, scratch):
        encoder.add(array(products), first, rule, batch.relative, n_threads())
    row_offsets, features, values, smallest = encoder.finish(n_threads())
    K = norms_FK.shape[1]
    code = SparseCode(
        torch.from_numpy(row_offsets),
        torch.from_numpy(features),
        torch.from_numpy(values),
        torch.full((len(features),), -1 if K == 64 else (1 << K) - 1, dtype=torch.int64),
        n_snapshots=K,
        n_features=len(largest_F),
    )
    return code, torch.tensor(smallest, dtype=torch.float32)
