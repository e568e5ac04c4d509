"""The early phase of training: how near the language model's predictions are to unigram and bigram statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
            model = study.snapshots.load(k)
            phases.append(measure_phase(model, ids, targets, on_batch=progress.advance))
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


NGRAMS = Analysis(
    "ngrams",
    version=1,
    section="N-gram phase",
    definition="KL of the snapshots' predictions from unigram and bigram statistics (the paper's), loss and entropies",
    result=NgramsResult,
    compute=compute,
    summary=summary,
)
