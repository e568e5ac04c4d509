"""Revival from residuals: a dead feature restarts as what is reconstructed worst (docs/method.md, section 6).

The residual of one token over all K snapshots together brings its own profile over the snapshots, so a feature's
history is not invented.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.backends.adam_state import AdamState
from crosscoder.model import Crosscoder
from crosscoder.train.whitening import matched_encoder

LAST_SHARE_OF_STEPS = 0.7
RATE_DECAY = 0.99


class FiringRate:
    """Moving average, over about 100 steps, of the share of the tokens on which each feature fires."""

    def __init__(self, n_features: int, device: torch.device) -> None:
        self.average_F = torch.zeros(n_features, device=device, dtype=torch.float32)
        self.n_steps = 0

    def update(self, fired_F: Tensor, n_tokens: int) -> None:
        self.average_F.mul_(RATE_DECAY).add_(fired_F, alpha=(1 - RATE_DECAY) / max(1, n_tokens))
        self.n_steps += 1

    def rates(self) -> Tensor:
        """(F,), corrected for the start from 0."""
        return self.average_F / max(1 - RATE_DECAY**self.n_steps, 1e-12)


@torch.no_grad()
def revive(
    model: Crosscoder,
    state: AdamState,
    residual_BKD: Tensor,
    rates_F: Tensor,
    minimum_rate: float,
    step: int,
    generator: torch.Generator,
) -> int:
    """Restart the features that fire more rarely than `minimum_rate`. Returns how many.

    Each gets the residual x - x^ (`residual_BKD` is x^ - x) of another token, drawn with probability proportional
    to its squared error, scaled to the live features' median norm; bias 0, the live median threshold, first
    moments 0, second moments the live mean. `step`: steps done. At most B features are revived at once.
    """
    dead_F = rates_F < minimum_rate
    errors_B = residual_BKD.flatten(1).square().sum(dim=1)
    count = min(int(dead_F.sum()), int((errors_B > 0).sum()))
    if count == 0 or bool(dead_F.all()):
        return 0
    rows = dead_F.nonzero().squeeze(1)[:count]
    live_F = ~dead_F
    tokens = torch.multinomial(errors_B.double().cpu(), count, generator=generator).to(errors_B.device)
    vectors = -residual_BKD[tokens]
    norms_FK = model.decoder_norms()
    norm = torch.linalg.vector_norm(norms_FK, dim=1)[live_F].median()
    vectors *= (norm / torch.linalg.vector_norm(vectors.flatten(1), dim=1))[:, None, None]
    model.W_dec[rows] = vectors.to(model.W_dec.dtype)
    model.W_enc[rows] = matched_encoder(model, vectors).to(model.W_enc.dtype)
    model.b_enc[rows] = 0
    model.log_threshold[rows] = model.log_threshold[live_F].median()
    state.restart_rows(rows, live_F, step)
    return count
