"""When the language model learns to repeat what it has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosscoder.config import StudySettings
from crosscoder.evolution.analyses.ngrams import SECTION
from crosscoder.evolution.induction import N_SEQUENCES, induction_gap
from crosscoder.evolution.study import Analysis, Study
from crosscoder.evolution.summary import by_snapshot
from crosscoder.figures.results import Fact, Part, Results
from crosscoder.figures.spec import Axis, Lines, Panel, Series
from crosscoder.figures.table import FigureTable, plain_column
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
            model = study.snapshots.load(k).to(study.device)
            gaps.append(induction_gap(model, vocabulary, length=settings.induction_length, seed=settings.seed))
            progress.advance(1)
    return InductionResult(np.array(gaps))


def summary(induction: InductionResult, revisions: Sequence[str]) -> dict[str, Any]:
    """The gap at the end, and the curve."""
    return {
        "induction_gap": float(induction.gap[-1]),
        "induction_gap_by_snapshot": by_snapshot(revisions, induction.gap),
    }


def curve(found: InductionResult, results: Results) -> FigureTable | None:
    """The gap over training."""
    return FigureTable(
        "induction",
        "Induction",
        "standard",
        "Random tokens repeated twice: loss on the first copy minus loss on the second. Above 0, the model "
        "copies from its context.",
        results.by_snapshot | {"gap": plain_column(found.gap)},
        Lines([Panel(Axis("loss difference, nats", zero=True), [Series("gap", "gap", colour="gap")])]),
    )


def forming(found: InductionResult, results: Results) -> str:
    """Whether and when induction forms."""
    settings, steps_K = results.of(StudySettings), results.steps
    rise = int(np.argmax(np.diff(found.gap)))
    measured = "" if settings is None else (
        f"; measured on {N_SEQUENCES} sequences of {settings.induction_length} random tokens said twice"
    )  # fmt: skip
    start, end = found.gap[0], found.gap[-1]
    if end < 0.1:
        return f"Induction does not form (gap {end:.2f} nats at the end, {start:.2f} at the start{measured})."
    return (
        f"Induction forms: repeated random tokens are {end:.2f} nats cheaper at the end ({start:.2f} at the "
        f"start), the steepest rise lies between steps {steps_K[rise]:,} and {steps_K[rise + 1]:,}{measured}."
    )


def facts(found: InductionResult, results: Results) -> list[Fact]:
    """The gap at the end."""
    return [Fact("Induction gap", f"{found.gap[-1]:.2f} nats", "last snapshot; random tokens, repeated")]


INDUCTION = Analysis(
    "induction",
    version=1,
    definition="loss on random tokens minus loss on their repetition",
    result=InductionResult,
    compute=compute,
    summary=summary,
    settings=("induction_length", "seed"),
    page=Part(InductionResult, SECTION, (curve,), (forming,), facts),
    required=True,
)
