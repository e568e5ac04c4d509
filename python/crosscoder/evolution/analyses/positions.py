"""Where each feature is active in the training tokens: what types and complexity are told from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from crosscoder.code import SparseCode
from crosscoder.evolution.analyses.examples import BATCH_TOKENS
from crosscoder.evolution.positions import Positions, collect_positions
from crosscoder.evolution.study import Analysis, Study
from crosscoder.progress import Progress


def compute(study: Study) -> Positions:
    """One pass over the store."""
    store = study.store
    with Progress("positions", store.n_tokens, "tokens") as progress:

        def batches() -> Iterator[tuple[SparseCode, np.ndarray, np.ndarray]]:
            for x_BKD, sequence_B, position_B in store.whole_sequences(BATCH_TOKENS):
                yield study.folded.encode(x_BKD), sequence_B, position_B
                progress.advance(len(x_BKD))

        return collect_positions(
            batches(),
            study.folded.config.n_features,
            study.train,
            n_positions=study.settings.positions,
            seed=study.settings.seed,
        )


POSITIONS = Analysis(
    "positions",
    version=1,
    definition="the strongest positions of each feature, a uniform sample of its active ones, and how they cluster in "
    "passages, on the training tokens",
    result=Positions,
    compute=compute,
    settings=("positions", "seed"),
)
