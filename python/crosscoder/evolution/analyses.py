"""What `crosscoder evolve` computes: one function an analysis, from a `Study` to plain results.

Letters: F features, K snapshots, B tokens in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosscoder.activations.loader import ActivationLoader
from crosscoder.activations.store import ActivationStore
from crosscoder.code import SparseCode
from crosscoder.evolution.complexity import choose_features, context_needed, correlations, token_entropy
from crosscoder.evolution.dimensionality import feature_dimensionality, kind_dimensionality
from crosscoder.evolution.examples import ExampleCollector, contexts, histogram_edges
from crosscoder.evolution.geometry import decoder_norms
from crosscoder.evolution.induction import induction_gap
from crosscoder.evolution.latent_scaling import LatentScaling, ScalingSums
from crosscoder.evolution.life_statistics import life_intervals, shuffled_life
from crosscoder.evolution.neighbours import nearest_neighbours
from crosscoder.evolution.ngrams import (
    count_ngrams,
    entropy_lines,
    measure_phase,
    ngram_targets,
    phase_curves,
)
from crosscoder.evolution.positions import Places, Positions, collect_positions
from crosscoder.evolution.probes import (
    Areas,
    ProbeTrainer,
    norm_honesty,
    snapshot_areas,
    stratified_sample,
)
from crosscoder.evolution.reading import snapshot_reader
from crosscoder.evolution.rotation import decoder_cosines, turning_point
from crosscoder.evolution.strength import EMERGENT, KIND_NAMES, life_cycles, threshold_sweep
from crosscoder.evolution.study import Study
from crosscoder.evolution.types import MIN_EXAMPLES, emergence_by_type, feature_types, induction_responses
from crosscoder.progress import Progress

BATCH_TOKENS = 2048
PROBE_TOKENS, HELDOUT_TOKENS = 1 << 20, 1 << 17
"""Probes are trained on at most so many tokens, and tested on at most so many."""
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


def positions(study: Study) -> Any:
    store = study.store
    with Progress("positions", store.n_tokens, "tokens") as progress:

        def batches() -> Iterator[tuple[SparseCode, np.ndarray, np.ndarray]]:
            for x_BKD, sequence_B, position_B in store.whole_sequences(EXAMPLES_BATCH):
                yield study.folded.encode(x_BKD), sequence_B, position_B
                progress.advance(len(x_BKD))

        return collect_positions(
            batches(),
            study.folded.config.n_features,
            study.train,
            n_positions=study.settings.positions,
            seed=study.settings.seed,
        )


def types(study: Study) -> dict[str, Any]:
    seed = study.settings.seed
    repeated, unrelated = induction_responses(
        snapshot_reader(study.snapshots, study.folded, title="types"),
        study.folded.config.n_features,
        len(study.snapshots.load_tokenizer()),
        length=study.settings.induction_length,
        end_of_text=study.train.end_of_text,
        seed=seed,
    )
    found = feature_types(_positions(study), study.train, repeated, unrelated, seed=seed)
    parts = {
        part: emergence_by_type(found.type, emergence_F, study.steps, seed=seed)
        for part, emergence_F in _emergence(study).items()
    }
    return {"features": found, **parts}


def complexity(study: Study) -> dict[str, Any]:
    seed, places, emergence = study.settings.seed, _positions(study), _emergence(study)
    entropy = token_entropy(places, study.train)
    eligible_F = places.fired >= MIN_EXAMPLES
    features = choose_features(emergence["all"], eligible_F, study.settings.complexity_features, seed=seed)
    read = snapshot_reader(study.snapshots, study.folded, title="complexity")
    context = context_needed(read, study.train, places.strongest, features)
    needed_F = np.full(places.fired.size, np.nan)
    needed_F[features] = np.log2(context.needed)
    measures = {"entropy": entropy.here, "entropy_before": entropy.before, "context": needed_F}
    parts = {
        part: correlations(measures, emergence_F, study.steps, seed=seed) for part, emergence_F in emergence.items()
    }
    return {"entropy": entropy, "context": context, **parts}


def _emergence(study: Study) -> dict[str, np.ndarray]:
    """(F,) emergence of all features, and of the emergent ones alone (-1 for the others)."""
    life = study.result("life")
    emergence_F = life["cycles.emergence"]
    return {"all": emergence_F, "emergent": np.where(life["cycles.kind"] == EMERGENT, emergence_F, -1)}


def _positions(study: Study) -> Positions:
    arrays = study.result("positions")

    def places(name: str) -> Places:
        return Places(*(arrays[f"{name}.{field}"] for field in ("value", "sequence", "position")))

    return Positions(
        n_tokens=int(arrays["n_tokens"]),
        fired=arrays["fired"],
        strongest=places("strongest"),
        sampled=places("sampled"),
        passages=arrays["passages"],
        most_in_passage=arrays["most_in_passage"],
        passage_sizes=arrays["passage_sizes"],
    )


def probes(study: Study) -> dict[str, Any]:
    life, n_snapshots = study.result("life"), study.model.config.n_snapshots
    seed = study.settings.seed
    ids, weights = stratified_sample(
        life["cycles.kind"],
        life["cycles.emergence"],
        study.settings.n_probed,
        alive_F=study.result("examples")["fired_any"] > 0,
        seed=seed,
    )
    ids_n = torch.from_numpy(ids)
    scale_K = study.folded.snapshot_scale
    mean_KD = torch.from_numpy(study.store.means()).float() * scale_K[:, None]
    trainer = ProbeTrainer(mean_KD, len(ids), seed=seed)
    n_train = min(study.store.n_tokens, PROBE_TOKENS)
    with Progress("probes", n_train, "tokens") as progress:
        for x_BKD in _scaled(study, study.store, n_train, shuffle=True):
            trainer.add(x_BKD, _active(study.model.encode(x_BKD), ids_n))
            progress.advance(len(x_BKD))
    probes = trainer.probes()

    store = study.run.store("heldout")
    n_heldout = min(store.n_tokens, HELDOUT_TOKENS)
    W_nKD, b_n = study.model.W_enc.detach()[ids_n].float(), study.model.b_enc.detach()[ids_n].float()
    active, h, areas = [], [], list[Areas]()
    with Progress("probes, held out", n_heldout * (1 + n_snapshots), "tokens") as progress:
        for x_BKD in _scaled(study, store, n_heldout, shuffle=False):
            active.append(_active(study.model.encode(x_BKD), ids_n))
            h.append(x_BKD.flatten(1) @ W_nKD.flatten(1).T + b_n)
            progress.advance(len(x_BKD))
        active_Tn, h_Tn = torch.cat(active), torch.cat(h)
        for k in range(n_snapshots):
            x_TD = torch.cat([x_BKD[:, 0] for x_BKD in _scaled(study, store, n_heldout, shuffle=False, only=k)])
            areas.append(snapshot_areas(probes, k, x_TD, active_Tn, h_Tn - x_TD @ W_nKD[:, k].T))
            progress.advance(n_heldout)
    found = {name: np.stack([getattr(area, name) for area in areas], axis=1) for name in Areas.__dataclass_fields__}
    relative_nK = life["cycles.relative"][ids]
    return {
        "features": ids.astype(np.int32),
        "weights": weights,
        "n_active": probes.n_active,
        "n_active_heldout": active_Tn.sum(dim=0),
        "n_tokens": probes.n_tokens,
        "n_tokens_heldout": n_heldout,
        "relative": relative_nK,
        "norms": life["norms"][ids],
        "areas": found,
        "honesty": norm_honesty(
            found["auc"],
            relative_nK,
            auc_without_nK=found["without"],
            features_n=ids,
            weights_n=weights,
            seed=seed,
        ),
    }


def latent_scaling(study: Study) -> LatentScaling:
    alive_F = study.result("examples")["fired_any"] > 0
    sums = ScalingSums(study.model.W_dec.detach(), alive_F=alive_F, seed=study.settings.seed)
    with Progress("latent scaling", study.store.n_tokens, "tokens") as progress:
        for x_BKD in _scaled(study, study.store, study.store.n_tokens, shuffle=False):
            code = study.model.encode(x_BKD)
            reconstruction_BKD = study.model.decode(code)
            sums.add(code, x_BKD - reconstruction_BKD, reconstruction_BKD)
            progress.advance(len(x_BKD))
    return sums.result()


def _scaled(
    study: Study, store: ActivationStore, n_tokens: int, *, shuffle: bool, only: int | None = None
) -> Iterator[Tensor]:
    """The first `n_tokens` scaled activations of a store (B, K, D), or those of one snapshot (B, 1, D)."""
    scale_K = study.folded.snapshot_scale.double().numpy()
    if only is not None:
        store, scale_K = store.select([store.snapshot_names[only]]), scale_K[only : only + 1]
    loader = ActivationLoader(store, BATCH_TOKENS, study.settings.seed, shuffle=shuffle, scale=scale_K, drop_last=False)
    for x_BKD in loader:
        yield x_BKD[:n_tokens]
        n_tokens -= len(x_BKD)
        if n_tokens <= 0:
            return


def _active(code: SparseCode, ids_n: Tensor) -> Tensor:
    """(B, n) bool: whether the features of the given ids are on at one snapshot or more."""
    column_F = torch.full((code.n_features,), -1)
    column_F[ids_n] = torch.arange(len(ids_n))
    column_N = column_F[code.features.long()]
    active_Bn = torch.zeros(code.n_tokens, len(ids_n), dtype=torch.bool)
    active_Bn[code.rows()[column_N >= 0], column_N[column_N >= 0]] = True
    return active_Bn


def _norms(study: Study) -> np.ndarray:
    norms_FK: np.ndarray = (decoder_norms(study.decoders).double() * study.decoder_scale.double()).numpy()
    return norms_FK


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
    "positions": Analysis(
        positions,
        "the strongest positions of each feature, a uniform sample of its active ones, and how they cluster in "
        "passages, on the training tokens",
        settings=("positions", "seed"),
    ),
    "types": Analysis(
        types,
        "type of each feature: single-token, previous-token, induction, context-sensitive (the paper's names) by rules "
        "over its strongest positions and random sequences said twice, with controls, and whether types differ in "
        "emergence (ours)",
        settings=("induction_length", "seed"),
        needs=("positions", "life"),
    ),
    "complexity": Analysis(
        complexity,
        "complexity without a language model's marks: entropy of the tokens at and before active positions, the "
        "context that the activation needs, and their correlations with emergence (ours)",
        settings=("complexity_features", "seed"),
        needs=("positions", "life"),
    ),
    "probes": Analysis(
        probes,
        "AUC of a linear probe (Fisher's discriminant) of each snapshot's activations for \"the feature is active\" on "
        "held-out tokens, against the relative norm (ours); features sampled by kind and emergence, each with the "
        "number it stands for",
        settings=("n_probed", "seed"),
        needs=("examples", "life"),
    ),
    "latent_scaling": Analysis(
        latent_scaling,
        "beta of each feature's activation in what the crosscoder leaves out (with the feature's own part) and in what "
        "it puts there, at every snapshot, along the decoder at the peak, the own one and another feature's (after "
        "Minder et al. 2025)",
        settings=("seed",),
        needs=("examples",),
    ),
}
