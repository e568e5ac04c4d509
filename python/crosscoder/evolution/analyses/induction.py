"""When the language model learns to repeat what it has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosscoder.evolution.induction import induction_gap
from crosscoder.evolution.study import Analysis, Study
from crosscoder.evolution.summary import by_snapshot
from crosscoder.progress import Progress


@dataclass(frozen=True)
class InductionResult:
    """The gap at every snapshot."""

    gap: NDArray[np.float64]
    """(K,) nats a token: loss on random tokens minus loss on their repetition."""


def compute(study: Study) -> InductionResult:
    """With the same random sequences at every snapshot."""
    settings, vocabulary = study.settings, len(study.snapshots.load_tokenizer())
    gaps = []
    with Progress("induction", study.snapshots.n_snapshots, "snapshots") as progress:
        for k in range(study.snapshots.n_snapshots):
            model = study.snapshots.load(k)
            gaps.append(induction_gap(model, vocabulary, length=settings.induction_length, seed=settings.seed))
            progress.advance(1)
    return InductionResult(np.array(gaps))


def summary(induction: InductionResult, revisions: Sequence[str]) -> dict[str, Any]:
    """The gap at the end, and the curve."""
    return {
        "induction_gap": float(induction.gap[-1]),
        "induction_gap_by_snapshot": by_snapshot(revisions, induction.gap),
    }


INDUCTION = Analysis(
    "induction",
    version=1,
    section="N-gram phase",
    definition="loss on random tokens minus loss on their repetition",
    result=InductionResult,
    compute=compute,
    summary=summary,
    settings=("induction_length", "seed"),
)
