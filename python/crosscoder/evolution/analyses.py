"""What `crosscoder evolve` computes: one function an analysis, from a `Study` to plain results.

Letters: F features, K snapshots, B tokens in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscoder.code import SparseCode
from crosscoder.evolution.dimensionality import feature_dimensionality, kind_dimensionality
from crosscoder.evolution.examples import collect_examples, contexts
from crosscoder.evolution.geometry import decoder_norms
from crosscoder.evolution.induction import induction_gap
from crosscoder.evolution.life_statistics import life_intervals, shuffled_life
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
    store = study.store
    config = study.folded.config
    with Progress("examples", store.n_tokens, "tokens") as progress:

        def batches() -> Iterator[tuple[SparseCode, np.ndarray, np.ndarray]]:
            for x_BKD, sequence_B, position_B in store.in_text_order(1024):
                yield study.folded.encode(x_BKD), sequence_B, position_B
                progress.advance(len(x_BKD))

        examples = collect_examples(
            batches(), config.n_features, config.n_snapshots, n_examples=study.settings.contexts
        )
    windows = contexts(examples, study.train)
    return {
        "n_tokens": examples.n_tokens,
        "fired": examples.fired,
        "fired_any": examples.fired_any,
        "firing_rate": examples.firing_rate,
        "max_activation": examples.max_activation,
        "mean_activation": examples.mean_activation,
        "contexts": windows,
    }


def life(study: Study) -> dict[str, Any]:
    norms_FK, alive_F = _norms(study), study.result("examples")["fired_any"] > 0
    cycles = life_cycles(norms_FK, study.steps, threshold=study.settings.tau, alive_F=alive_F)
    return {
        "norms": norms_FK,
        "cycles": cycles,
        "interval": life_intervals(cycles, seed=study.settings.seed),
        "null": shuffled_life(cycles, seed=study.settings.seed),
        "sweep": threshold_sweep(norms_FK, study.steps, reference=study.settings.tau, alive_F=alive_F),
    }


def rotation(study: Study) -> dict[str, Any]:
    present_FK = study.result("life")["cycles.present"]
    seed = study.settings.seed
    found = decoder_cosines(study.decoders, present_FK, masks=_kinds(study), seed=seed)
    turning = turning_point(found, study.steps, seed=seed)
    kept = {name: getattr(found, name) for name in ("overall", "by_mask", "levels", "to_final", "to_previous")}
    return {**kept, "turning_point": turning}


def dimensionality(study: Study) -> Any:
    return feature_dimensionality(study.decoders, masks=_kinds(study), seed=study.settings.seed)


def by_kind(study: Study) -> Any:
    return kind_dimensionality(study.decoders, _kinds(study), seed=study.settings.seed)


def neighbours(study: Study) -> Any:
    alive_F = study.result("examples")["fired_any"] > 0
    return nearest_neighbours(
        study.decoders, n_neighbours=study.settings.neighbours, scale_K=study.decoder_scale, alive_F=alive_F
    )


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
    norms_FK: np.ndarray = (decoder_norms(study.decoders).double() * study.decoder_scale.double()).numpy()
    return norms_FK


def _kinds(study: Study) -> dict[str, np.ndarray]:
    kind_F = study.result("life")["cycles.kind"]
    return {name: kind_F == code for code, name in enumerate(KIND_NAMES)}


ANALYSES: dict[str, Analysis] = {
    "examples": Analysis(
        examples,
        "firing counts by snapshot and the strongest contexts of each feature, one a sequence, on the training tokens",
        settings=("contexts",),
    ),
    "life": Analysis(
        life,
        "decoder norms (the paper's); present where the norm is above tau times the feature's maximum, initialization "
        "iff present at step 0, emergence at the first of two snapshots in a row where it is present (ours); intervals "
        "by a bootstrap over features, null by shuffled snapshots (ours)",
        settings=("tau", "seed"),
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
        "feature dimensionality (the paper's), summed over features / D; by kind as parts of the whole, and expected "
        "of random directions with the same norms (ours)",
        settings=("seed",),
        needs=("life",),
    ),
    "kind_dimensionality": Analysis(
        by_kind,
        "feature dimensionality of each kind's features as if there were no others, and expected of random directions "
        "with the same norms (ours)",
        settings=("seed",),
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
