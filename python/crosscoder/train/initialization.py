"""The start of training: the decoder norm that reconstructs best (docs/method.md, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.model import Crosscoder

SMALLEST_NORM = 0.02
RATIO = 1.25
CANDIDATES = 24
SAMPLE_TOKENS = 512


@torch.no_grad()
def search_decoder_norm(model: Crosscoder, x_BKD: Tensor) -> float:
    """Scale every decoder row of a fresh `model` to the norm with the smallest squared error on `x_BKD`.

    The search is geometric, from 0.02 to about 3.4: a linear grid that starts at 0.1 misses the best for large K F.
    W_enc = W_dec afterwards. Returns the norm.
    """
    x_BKD = model.check_input(x_BKD[:SAMPLE_TOKENS])
    directions_FKD = model.W_dec / torch.linalg.vector_norm(model.W_dec, dim=2, keepdim=True)
    best, best_error = SMALLEST_NORM, float("inf")
    for i in range(CANDIDATES):
        norm = SMALLEST_NORM * RATIO**i
        model.W_dec.copy_(norm * directions_FKD)
        model.W_enc.copy_(model.W_dec)
        error = float((model(x_BKD) - x_BKD).square().mean())
        if error < best_error:
            best, best_error = norm, error
    model.W_dec.copy_(best * directions_FKD)
    model.W_enc.copy_(model.W_dec)
    return best
