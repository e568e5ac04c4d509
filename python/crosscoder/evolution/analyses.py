"""What `crosscoder evolve` computes: one function an analysis, from a `Study` to plain results.

Letters: F features, K snapshots, B tokens in a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscoder.evolution.dimensionality import feature_dimensionality
from crosscoder.evolution.examples import ExampleCollector, contexts, histogram_edges
from crosscoder.evolution.induction import induction_gap
from crosscoder.evolution.neighbours import nearest_neighbours
from crosscoder.evolution.ngrams import (
    count_ngrams,
    entropy_lines,
    measure_phase,
    ngram_targets,
    phase_curves,
)
from crosscoder.evolution.rotation import decoder_cosines, turning_point
from crosscoder.evolution.strength import KIND_NAMES, life_cycles, threshold_sweep
from crosscoder.evolution.study import Study
from crosscoder.progress import Progress

EXAMPLES_BATCH = 1024
"""Tokens that are encoded at a time."""


@dataclass(frozen=True)
class Analysis:
    """How an analysis is computed, what it is, and what it rests on beside crosscoder, tokens and snapshots."""

    compute: Callable[[Study], Any]
    """A (nested) dataclass or mapping of arrays: saved flat, names joined by points."""
    definition: str
    """In one sentence, for the reader of the result. A change of it makes old results stale."""
    settings: tuple[str, ...] = ()
    """The fields of `StudySettings` that it reads."""
    needs: tuple[str, ...] = ()
    """The analyses whose results it reads."""


def examples(study: Study) -> dict[str, Any]:
    store, model, settings = study.store, study.folded, study.settings
    collector = ExampleCollector(
        model.config.n_features,
        model.config.n_snapshots,
        n_examples=settings.contexts,
        n_samples=settings.samples,
        seed=settings.seed,
    )
    partial = study.partial("examples", store.identity)
    if (state := partial.load()) is not None:
        collector.load_state(state)
    with Progress("examples", store.n_tokens, "tokens", done=collector.n_tokens) as progress:
        for x_BKD, sequence_B, position_B in store.whole_sequences(EXAMPLES_BATCH, skip=collector.n_tokens):
            collector.add(model.encode(x_BKD), sequence_B, position_B)
            partial.offer(collector.state)
            progress.advance(len(x_BKD))
    found = collector.result()
    return {
        "n_tokens": found.n_tokens,
        "fired": found.fired,
        "fired_any": found.fired_any,
        "firing_rate": found.firing_rate,
        "max_activation": found.max_activation,
        "mean_activation": found.mean_activation,
        "histogram": found.histogram,
        "histogram_edges": histogram_edges(),
        "before": found.strongest.before,
        "contexts": contexts(found.strongest, study.train),
        "sampled": contexts(found.sampled, study.train),
    }


def life(study: Study) -> dict[str, Any]:
    norms_FK, alive_F = _norms(study), study.result("examples")["fired_any"] > 0
    return {
        "norms": norms_FK,
        "cycles": life_cycles(norms_FK, study.steps, threshold=study.settings.tau, alive_F=alive_F),
        "sweep": threshold_sweep(norms_FK, study.steps, reference=study.settings.tau, alive_F=alive_F),
    }


def rotation(study: Study) -> dict[str, Any]:
    present_FK = study.result("life")["cycles.present"]
    seed = study.settings.seed
    found = decoder_cosines(study.model.W_dec.detach(), present_FK, masks=_kinds(study), seed=seed)
    turning = turning_point(found, study.steps, seed=seed)
    kept = {name: getattr(found, name) for name in ("overall", "by_mask", "levels", "to_final", "to_previous")}
    return {**kept, "turning_point": turning}


def dimensionality(study: Study) -> Any:
    return feature_dimensionality(study.model.W_dec.detach(), masks=_kinds(study))


def neighbours(study: Study) -> Any:
    alive_F = study.result("examples")["fired_any"] > 0
    return nearest_neighbours(study.model.W_dec.detach(), n_neighbours=study.settings.neighbours, alive_F=alive_F)


def ngrams(study: Study) -> dict[str, Any]:
    vocabulary = int(study.snapshots.load_config(0).vocab_size)
    counts = count_ngrams(study.counted.ids, vocabulary)
    targets = ngram_targets(counts)
    phases, ids = [], study.heldout.ids
    total = study.snapshots.n_snapshots * len(ids)
    with Progress("n-gram phase", total, "sequences") as progress:
        for k in range(study.snapshots.n_snapshots):
            model = study.snapshots.load(k)
            phases.append(measure_phase(model, ids, targets, on_batch=progress.advance))
    return {"curves": phase_curves(phases, targets), "entropies": entropy_lines(counts, ids)}


def induction(study: Study) -> dict[str, Any]:
    length = study.settings.induction_length
    vocabulary = len(study.snapshots.load_tokenizer())
    gaps = []
    with Progress("induction", study.snapshots.n_snapshots, "snapshots") as progress:
        for k in range(study.snapshots.n_snapshots):
            model = study.snapshots.load(k)
            gaps.append(induction_gap(model, vocabulary, length=length, seed=study.settings.seed))
            progress.advance(1)
    return {"gap": np.array(gaps)}


def _norms(study: Study) -> np.ndarray:
    norms: np.ndarray = study.model.decoder_norms().detach().double().numpy()
    return norms


def _kinds(study: Study) -> dict[str, np.ndarray]:
    kind_F = study.result("life")["cycles.kind"]
    return {name: kind_F == code for code, name in enumerate(KIND_NAMES)}


ANALYSES: dict[str, Analysis] = {
    "examples": Analysis(
        examples,
        "on the training tokens, for each feature: firing counts by snapshot, a histogram of its activations, its "
        "strongest contexts, one a sequence, and contexts of a uniform sample of the tokens where it is active",
        settings=("contexts", "samples", "seed"),
    ),
    "life": Analysis(
        life,
        "decoder norms (the paper's); present where the norm is above tau times the feature's maximum, initialization "
        "iff present at step 0, emergence at the first of two snapshots in a row where it is present (ours)",
        settings=("tau",),
        needs=("examples",),
    ),
    "rotation": Analysis(
        rotation,
        "cosines of decoder directions between snapshots (the paper's), over features present at both; turning point "
        "with bootstrap interval and nulls (ours)",
        settings=("seed",),
        needs=("life",),
    ),
    "dimensionality": Analysis(
        dimensionality,
        "feature dimensionality (the paper's), summed over features / D",
        needs=("life",),
    ),
    "neighbours": Analysis(
        neighbours,
        "nearest features by cosine of decoders over all snapshots (ours)",
        settings=("neighbours",),
        needs=("examples",),
    ),
    "ngrams": Analysis(
        ngrams,
        "KL of the snapshots' predictions from unigram and bigram statistics (the paper's), loss and entropies",
    ),
    "induction": Analysis(
        induction,
        "loss on random tokens minus loss on their repetition",
        settings=("induction_length", "seed"),
    ),
}
