"""The early phase of training: how near the language model's predictions are to unigram and bigram statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscoder.evolution.analyses.rotation import RotationResult, phases
from crosscoder.evolution.ngrams import (
    EntropyLines,
    NgramCurves,
    count_ngrams,
    entropy_lines,
    measure_phase,
    ngram_targets,
    phase_curves,
)
from crosscoder.evolution.study import Analysis, Study
from crosscoder.evolution.summary import by_snapshot
from crosscoder.figures.results import Fact, Part, Results
from crosscoder.figures.spec import Axis, Lines, Panel, Series
from crosscoder.figures.table import FigureTable, plain_column
from crosscoder.progress import Progress


@dataclass(frozen=True)
class NgramsResult:
    """Curves over snapshots, and the entropies to hold them against."""

    curves: NgramCurves
    entropies: EntropyLines


def compute(study: Study) -> NgramsResult:
    """Counts come from text that is disjoint from the held-out text that is predicted."""
    vocabulary = int(study.snapshots.load_config(0).vocab_size)
    counts = count_ngrams(study.counted.ids, vocabulary)
    targets = ngram_targets(counts)
    phases, ids = [], study.heldout.ids
    total = study.snapshots.n_snapshots * len(ids)
    with Progress("n-gram phase", total, "sequences") as progress:
        for k in range(study.snapshots.n_snapshots):
            model = study.snapshots.load(k).to(study.device)
            phases.append(measure_phase(model, ids, targets, device=study.device, on_batch=progress.advance))
    return NgramsResult(phase_curves(phases, targets), entropy_lines(counts, ids))


def summary(ngrams: NgramsResult, revisions: Sequence[str]) -> dict[str, Any]:
    """Loss and entropies, in nats a token."""
    names = ("uniform", "unigram", "bigram", "unigram_plugin", "bigram_plugin", "bigram_corrected")
    return {
        "model_loss": float(ngrams.curves.loss[-1]),
        "model_loss_by_snapshot": by_snapshot(revisions, ngrams.curves.loss),
        "bigram_entropy": ngrams.entropies.bigram,
        "entropies": {name: getattr(ngrams.entropies, name) for name in names},
    }


def loss(found: NgramsResult, results: Results) -> FigureTable | None:
    """The language model's loss beside the entropies, and the two phases."""
    lines = {
        "uniform (ln V)": found.entropies.uniform,
        "unigram": found.entropies.unigram,
        "bigram (Kneser–Ney)": found.entropies.bigram,
        "bigram (counts, corrected)": found.entropies.bigram_corrected,
    }
    rules = {label: float(f"{value:.6g}") for label, value in lines.items()}
    rotation = results.of(RotationResult)
    sharp = rotation is not None and rotation.turning_point.is_sharp
    parted, marks = phases(results)
    return FigureTable(
        "loss",
        "Loss and the n-gram levels" + (" and the two phases" if sharp else ""),
        "paper",
        "Mean cross-entropy of the language model on the evaluation text, at each snapshot (solid). Dashed: entropies "
        "of n-gram models, the levels that a model with only those statistics reaches."
        + (f" The paper tells a phase of statistics from one of features: {parted}" if parted else ""),
        results.by_snapshot | {"loss": plain_column(found.curves.loss)},
        Lines([Panel(Axis("nats a token"), [Series("loss", "model")], rules=rules)]),
        {"marks": marks} if marks else {},
        wide=True,
    )


def distances(found: NgramsResult, results: Results) -> FigureTable | None:
    """Distances of the predictions from n-gram statistics."""
    curves = {
        "unigram": found.curves.kl_unigram,
        "bigram": found.curves.kl_bigram,
        "bigram, corrected": found.curves.kl_bigram_corrected,
        "per prediction": found.curves.kl_bigram_each,
    }
    return FigureTable(
        "kl",
        "Distance to n-gram statistics",
        "both",
        "Unigram: KL divergence from the text's token frequencies to the model's mean prediction. Bigram: from the "
        "text's bigram rows to the mean prediction after each token. Corrected (ours): the same less the first-order "
        "estimate (Miller–Madow) of what the finite counts add to it; on sparse counts still too high. Per prediction: "
        "from the bigram row to each single prediction, averaged. The paper shows such curves; the formulas are ours, "
        "since it gives none.",
        results.by_snapshot | {name: plain_column(curve_K) for name, curve_K in curves.items()},
        Lines([Panel(Axis("KL divergence, nats", zero=True), [Series(name, name) for name in curves])]),
    )


def passing(found: NgramsResult, results: Results) -> str:
    """When the model's loss passes under the bigram entropy."""
    loss_K, bigram, lower = found.curves.loss, found.entropies.bigram, found.entropies.bigram_corrected
    start = (
        f"The language model's loss on {found.curves.n_predictions:,} held-out tokens falls from {loss_K[0]:.2f} to "
        f"{loss_K[-1]:.2f} nats a token"
    )
    passes = _passes(loss_K, bigram, results.steps)
    if passes is None:
        return (
            f"{start}, still above the {bigram:.2f} of a bigram model there: it has not left the phase of plain "
            "statistics."
        )
    below = _passes(loss_K, lower, results.steps)
    also = f"{below} under" if below is not None else "at no snapshot under"
    return (
        f"{start}; {passes} it passes under the {bigram:.2f} of a bigram model on the same tokens, {also} the "
        f"{lower:.2f} that the counts' bigram entropy is with its sampling bias removed to first order. It is one text "
        "and one training: no interval is known."
    )


def _passes(loss_K: np.ndarray, level: float, steps_K: np.ndarray) -> str | None:
    """Where the loss is below a level for the first time, in words; None if nowhere."""
    below = np.flatnonzero(loss_K < level)
    if not len(below):
        return None
    return f"between steps {steps_K[below[0] - 1]:,} and {steps_K[below[0]]:,}" if below[0] else "at the first snapshot"


def facts(found: NgramsResult, results: Results) -> list[Fact]:
    """Loss and entropy."""
    return [
        Fact("Model loss", f"{found.curves.loss[-1]:.2f} nats", "the last snapshot's, a token, on held-out documents"),
        Fact("Bigram entropy", f"{found.entropies.bigram:.2f} nats", "Kneser–Ney bigram model, same tokens"),
    ]


SECTION = "N-gram phase"

NGRAMS = Analysis(
    "ngrams",
    version=1,
    definition="KL of the snapshots' predictions from unigram and bigram statistics (the paper's), loss and entropies",
    result=NgramsResult,
    compute=compute,
    summary=summary,
    page=Part(NgramsResult, SECTION, (loss, distances), (passing,), facts),
    required=True,
)
