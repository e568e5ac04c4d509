"""Are the int8 candidates good enough? A sampled audit while training, and the decision to do without them.

Every `EVERY` steps the code of a few tokens is compared with that of the full float32 product. The tallies are part
of a checkpoint, so that a resumed run decides as an uninterrupted one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.code import SparseCode

REQUIRED_RECALL = 0.9999
EVERY = 50
TOKENS = 32
MEMORY = 0.99
"""How much of the tallies is kept from one audit to the next."""


class RecallAudit:
    """Running recall of the active pairs."""

    def __init__(self) -> None:
        self.tally = torch.zeros(3, dtype=torch.float64)
        """Pairs looked at, pairs missed (both fading), and 1 once int8 was given up."""

    def due(self, step: int) -> bool:
        """Is there an audit at this step?"""
        return step % EVERY == 0 and not self.given_up

    @property
    def given_up(self) -> bool:
        return bool(self.tally[2])

    def recall(self) -> Tensor:
        """(): share of the active pairs found, over the last hundred audits or so; 1 before the first."""
        return 1 - self.tally[1] / self.tally[0].clamp_min(1)

    def add(self, code: SparseCode, exact: SparseCode) -> bool:
        """Compare the code of the first tokens with `exact`, theirs. Returns True if int8 is now given up.

        That takes misses that chance does not explain: more than the allowed number and four deviations, and one.
        """
        n = exact.n_tokens
        kept = code.row_offsets[n]
        found = code.rows()[:kept] * code.n_features + code.features[:kept]
        active = exact.rows() * exact.n_features + exact.features
        missed = len(active) - int(torch.isin(active, found, assume_unique=True).sum())
        self.tally[:2] *= MEMORY
        self.tally[:2] += torch.tensor([len(active), missed], dtype=torch.float64)
        allowed = float(self.tally[0]) * (1 - REQUIRED_RECALL)
        if float(self.tally[1]) > allowed + 4 * allowed**0.5 + 1:
            self.tally[2] = 1
        return self.given_up
