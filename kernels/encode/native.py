"""Encode on a CPU: candidates from reduced-precision products, tile by tile in the cache, then exact h for them.

The code is that of float32 arithmetic whatever the products' type (but for int8, whose recall is measured).
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder import _core
from crosscoder.code import SparseCode
from crosscoder.kernels.arrays import array, array_or_none, n_threads
from crosscoder.kernels.encode.products import Batch, tiles
from crosscoder.kernels.encode.rows import EncoderRows
from crosscoder.kernels.scratch import Scratch

SLACK = 1e-6
"""Relative rounding of the cut itself."""


def encode(
    batch: Batch,
    W_enc_FKD: Tensor,
    b_enc_F: Tensor,
    norms_FK: Tensor,
    theta_F: Tensor,
    rows: EncoderRows,
    scratch: Scratch,
    *,
    shared: bool,
    window: float = 0.0,
    also_above_threshold: bool = False,
    max_density: float | None = None,
) -> SparseCode | None:
    """The pairs with h n > theta at the largest of the norms (`shared`: h > theta), and their gates.

    With a `window`, pairs down to theta - window / 2 are in the code too, with `also_above_threshold` all with
    h >= theta; their gates may all be closed. None as soon as more
    than `max_density` of the pairs of all tokens with the features seen so far are in the code.
    """
    scale_F = torch.ones_like(theta_F) if shared else norms_FK.amax(dim=1)
    level_F = theta_F - window / 2
    cut_F = (level_F / scale_F).clamp_min(0)
    if also_above_threshold:
        cut_F = torch.minimum(cut_F, theta_F)
    cut_F -= SLACK * cut_F + b_enc_F
    cut_F -= batch.relative * cut_F.abs() + SLACK * b_enc_F.abs()
    rule = batch.rule(cut_F, rows)
    keep = (array(scale_F), array(level_F), array_or_none(theta_F if also_above_threshold else None))
    encoder = _core.Encoder(array(batch.x_BC), array(W_enc_FKD.detach().flatten(1)), array(b_enc_F))
    for first, products in tiles(batch, W_enc_FKD, rows, scratch):
        n_pairs = encoder.add(array(products), first, rule, *keep, n_threads())
        n_seen = len(batch.x_BC) * (first + products.shape[1])
        if max_density is not None and n_pairs > max_density * n_seen:
            return None
    found = encoder.finish(array(norms_FK), array(theta_F), shared, n_threads())
    row_offsets, features, values, gates = map(torch.from_numpy, found)
    return SparseCode(row_offsets, features, values, gates, norms_FK.shape[1], len(theta_F))


def encode_ranked(
    batch: Batch,
    W_enc_FKD: Tensor,
    b_enc_F: Tensor,
    norms_FK: Tensor,
    rows: EncoderRows,
    scratch: Scratch,
    top_k: int,
    *,
    whole_batch: bool,
) -> tuple[SparseCode, Tensor]:
    """The `top_k` largest scores of each token, or B x `top_k` of the batch; and the smallest score kept, ()."""
    largest_F = norms_FK.amax(dim=1)
    weights = array(W_enc_FKD.detach().flatten(1))
    encoder = _core.RankEncoder(
        array(batch.x_BC), weights, array(b_enc_F), array(largest_F), top_k, whole_batch=whole_batch
    )
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
    return code, torch.tensor(smallest)
