"""Explained variance against L0, the crosscoder beside the sparse autoencoders (SAEs) that it must be better than.

Three methods are trained on the same activations over the same values of lambda and F, and evaluated on the same
held-out tokens:

- `crosscoder`: one dictionary over all K snapshots;
- `sae`: an SAE on the last snapshot alone, the paper's baseline;
- `chain`: an SAE for each snapshot, warm-started from that of the snapshot before (as SAE-Track does).

An SAE is the crosscoder of one snapshot: nonlinearity, penalty, optimiser and schedules are the same code. What each
method may use is in `budget`.
"""

from __future__ import annotations

from crosscoder.sweep.budget import Budget, budget_of, chain_steps
from crosscoder.sweep.frontier import Comparison, compare
from crosscoder.sweep.points import METHODS, Point, grid

__all__ = ["METHODS", "Budget", "Comparison", "Point", "budget_of", "chain_steps", "compare", "grid"]
