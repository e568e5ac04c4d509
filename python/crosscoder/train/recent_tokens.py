"""BatchTopK's threshold at inference, from the last tokens of training and the weights as they are now.

In training a batch keeps its B x top_k largest scores; at inference one threshold decides. The smallest score that a
batch kept belongs to the weights of its step, so a running mean of it lags behind. Here a few tokens of each of the
last batches are kept instead, and where a crosscoder leaves training (at the last step, and in every checkpoint) the
threshold is what lets top_k features a token through on them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from crosscoder.parameters import Weights

TOKENS = 8192
"""Tokens kept: L0 differs so much between tokens that its mean over fewer is off by some percent. They take the share
TOKENS / (6 F) of the memory of float32 weights and moments."""
TOKENS_A_BATCH = 512
"""Tokens of one batch at most, evenly spread over it: tokens of one batch may be alike."""


class RecentTokens:
    """The last `TOKENS` tokens given to `add`, on the weights' device; part of a checkpoint."""

    def __init__(self, weights: Weights) -> None:
        K, D = weights.config.n_snapshots, weights.config.d_model
        dtype = torch.promote_types(weights.W_enc.dtype, torch.float32)
        self._x_TKD = torch.zeros(TOKENS, K, D, dtype=dtype, device=weights.W_enc.device)
        self._n_added = torch.zeros((), dtype=torch.int64)  # on the host: nobody waits for it

    def add(self, x_BKD: Tensor) -> None:
        """Some tokens of one more batch. The host does not wait for the device."""
        some = x_BKD[:: max(1, len(x_BKD) // TOKENS_A_BATCH)][:TOKENS_A_BATCH].to(self._x_TKD.device, non_blocking=True)
        first = int(self._n_added) % TOKENS
        until_end = min(len(some), TOKENS - first)
        self._x_TKD[first : first + until_end] = some[:until_end].to(self._x_TKD.dtype)
        self._x_TKD[: len(some) - until_end] = some[until_end:].to(self._x_TKD.dtype)
        self._n_added += len(some)

    def tokens(self) -> Tensor:
        """(n, K, D), n at most `TOKENS`: those that are finite (a batch that is not is refused, and may come late)."""
        x_nKD = self._x_TKD[: min(TOKENS, int(self._n_added))]
        return x_nKD[torch.isfinite(x_nKD).flatten(1).all(dim=1)]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint holds, under unique names; loading copies into them."""
        yield "recent_activations", self._x_TKD
        yield "recent_count", self._n_added
