"""All analyses of one run, each saved under `evolution/` and computed again only when something it rests on changed.

Letters: F features, K snapshots, B tokens in a batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosscoder import weights
from crosscoder.activations.snapshots import SnapshotSet
from crosscoder.activations.store import ActivationStore
from crosscoder.activations.tokens import TokenSet
from crosscoder.code import SparseCode
from crosscoder.config import StudySettings
from crosscoder.errors import ConfigError, DataError
from crosscoder.evolution.dimensionality import feature_dimensionality
from crosscoder.evolution.examples import collect_examples, contexts
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
from crosscoder.files import read_json, write_bytes, write_json
from crosscoder.model import Crosscoder
from crosscoder.progress import Progress
from crosscoder.runs import Run

Arrays = dict[str, np.ndarray]


class Study:
    """The analyses of a run folder. `result(name)` computes what is not there yet, and what it needs."""

    def __init__(self, run: Run, settings: StudySettings) -> None:
        """Raises `DataError` with the remedy if the run lacks a crosscoder, activations or tokens."""
        self.run = run
        self.settings = settings
        run.require(run.crosscoder, f"train it first: crosscoder train {run.path} --help")
        run.require(run.activations("train"), f"collect first: crosscoder collect {run.path} --help")

    # ------------------------------------------------------------------------------------------- inputs

    @cached_property
    def folded(self) -> Crosscoder:
        """The crosscoder for raw activations."""
        return Crosscoder.from_pretrained(self.run.crosscoder).eval()

    @cached_property
    def model(self) -> Crosscoder:
        """The crosscoder for scaled activations: there all snapshots' decoders have one unit."""
        return self.folded.unfold_scales()

    @cached_property
    def snapshots(self) -> SnapshotSet:
        record = read_json(self.run.snapshots_file)
        model, site = self.run.absolute(record["model"]), record.get("site", "residual")
        return SnapshotSet.open(model, record["layer"], tuple(record["revisions"]), site)

    @cached_property
    def heldout(self) -> TokenSet:
        return TokenSet.load(self.run.tokens("heldout"))

    @cached_property
    def counted(self) -> TokenSet:
        """The corpus that n-grams are counted in, disjoint from `heldout`: the language model's own if it is here."""
        own = self.run.tokens("language_model")
        return TokenSet.load(own if own.exists() else self.run.tokens("train"))

    @cached_property
    def steps(self) -> np.ndarray:
        """(K,) training step of each snapshot."""
        return self.snapshots.steps

    # ------------------------------------------------------------------------------------------- results

    def result(self, name: str) -> Arrays:
        """The arrays of one analysis, from disk if they are of this crosscoder and these settings."""
        if name not in ANALYSES:
            raise ConfigError(f"there is no analysis {name!r}; known are {', '.join(ANALYSES)}")
        path, record = self.run.evolution / f"{name}.npz", self._record(name)
        described = path.with_suffix(".json")
        if path.exists() and described.exists() and read_json(described).get("of") == record["of"]:
            return load_arrays(path)
        arrays = flatten(ANALYSES[name].compute(self))
        # Without its record first: a kill between the two writes must not leave new arrays under an old description.
        described.unlink(missing_ok=True)
        save_arrays(path, arrays)
        write_json(described, record)
        return load_arrays(path)

    def _record(self, name: str) -> dict[str, Any]:
        _, config = weights.read_config(self.run.crosscoder)
        rests_on = {
            "crosscoder": config["checksums"],
            "tokens": {split: self._fingerprint(split) for split in ("train", "heldout", "language_model")},
            "snapshots": read_json(self.run.snapshots_file),
            "settings": dataclasses.asdict(self.settings),
        }
        digest = hashlib.sha256(json.dumps(rests_on, sort_keys=True).encode()).hexdigest()
        return {
            "analysis": name,
            "definition": ANALYSES[name].definition,
            "settings": rests_on["settings"],
            "of": digest,
        }

    def _fingerprint(self, split: str) -> str | None:
        path = self.run.tokens(split) / "tokens.json"
        return str(read_json(path)["fingerprint"]) if path.exists() else None

    # ------------------------------------------------------------------------------------------- analyses

    def examples(self) -> dict[str, Any]:
        store = ActivationStore.open(self.run.activations("train")).without_skipped()
        config = self.folded.config
        with Progress("examples", store.n_tokens, "tokens") as progress:

            def batches() -> Iterator[tuple[SparseCode, np.ndarray, np.ndarray]]:
                for x_BKD, sequence_B, position_B in store.in_text_order(1024):
                    yield self.folded.encode(x_BKD), sequence_B, position_B
                    progress.advance(len(x_BKD))

            examples = collect_examples(
                batches(), config.n_features, config.n_snapshots, n_examples=self.settings.contexts
            )
        windows = contexts(examples, TokenSet.load(self.run.tokens("train")))
        return {
            "n_tokens": examples.n_tokens,
            "fired": examples.fired,
            "fired_any": examples.fired_any,
            "firing_rate": examples.firing_rate,
            "max_activation": examples.max_activation,
            "mean_activation": examples.mean_activation,
            "contexts": windows,
        }

    def life(self) -> dict[str, Any]:
        norms_FK, alive_F = self._norms(), self.result("examples")["fired_any"] > 0
        return {
            "norms": norms_FK,
            "cycles": life_cycles(norms_FK, self.steps, threshold=self.settings.tau, alive_F=alive_F),
            "sweep": threshold_sweep(norms_FK, self.steps, reference=self.settings.tau, alive_F=alive_F),
        }

    def rotation(self) -> dict[str, Any]:
        present_FK = self.result("life")["cycles.present"]
        rotation = decoder_cosines(self.model.W_dec.detach(), present_FK, masks=self._kinds(), seed=self.settings.seed)
        turning = turning_point(rotation, self.steps, seed=self.settings.seed)
        kept = {name: getattr(rotation, name) for name in ("overall", "by_mask", "levels", "to_final", "to_previous")}
        return {**kept, "turning_point": turning}

    def dimensionality(self) -> Any:
        return feature_dimensionality(self.model.W_dec.detach(), masks=self._kinds())

    def neighbours(self) -> Any:
        alive_F = self.result("examples")["fired_any"] > 0
        return nearest_neighbours(self.model.W_dec.detach(), n_neighbours=self.settings.neighbours, alive_F=alive_F)

    def ngrams(self) -> dict[str, Any]:
        vocabulary = int(self.snapshots.load_config(0).vocab_size)
        counts = count_ngrams(self.counted.ids, vocabulary)
        targets = ngram_targets(counts)
        phases, ids = [], self.heldout.ids
        total = self.snapshots.n_snapshots * len(ids)
        with Progress("n-gram phase", total, "sequences") as progress:
            for k in range(self.snapshots.n_snapshots):
                model = self.snapshots.load(k)
                phases.append(measure_phase(model, ids, targets, on_batch=progress.advance))
        return {"curves": phase_curves(phases, targets), "entropies": entropy_lines(counts, ids)}

    def induction(self) -> dict[str, Any]:
        length = self.settings.induction_length
        vocabulary = len(self.snapshots.load_tokenizer())
        gaps = []
        with Progress("induction", self.snapshots.n_snapshots, "snapshots") as progress:
            for k in range(self.snapshots.n_snapshots):
                model = self.snapshots.load(k)
                gaps.append(induction_gap(model, vocabulary, length=length, seed=self.settings.seed))
                progress.advance(1)
        return {"gap": np.array(gaps)}

    def _norms(self) -> np.ndarray:
        norms: np.ndarray = self.model.decoder_norms().detach().double().numpy()
        return norms

    def _kinds(self) -> dict[str, np.ndarray]:
        kind_F = self.result("life")["cycles.kind"]
        return {name: kind_F == code for code, name in enumerate(KIND_NAMES)}


@dataclass(frozen=True)
class Analysis:
    """How an analysis is computed, and what it is, in one sentence."""

    compute: Callable[[Study], Any]
    definition: str


ANALYSES: dict[str, Analysis] = {
    "examples": Analysis(
        Study.examples,
        "firing counts by snapshot and the strongest contexts of each feature, one a sequence, on the training tokens",
    ),
    "life": Analysis(
        Study.life,
        "decoder norms (the paper's); present where the norm is above tau times the feature's maximum, initialization "
        "iff present at step 0, emergence at the first of two snapshots in a row where it is present (ours)",
    ),
    "rotation": Analysis(
        Study.rotation,
        "cosines of decoder directions between snapshots (the paper's), over features present at both; turning point "
        "with bootstrap interval and nulls (ours)",
    ),
    "dimensionality": Analysis(Study.dimensionality, "feature dimensionality (the paper's), summed over features / D"),
    "neighbours": Analysis(Study.neighbours, "nearest features by cosine of decoders over all snapshots (ours)"),
    "ngrams": Analysis(
        Study.ngrams,
        "KL of the snapshots' predictions from unigram and bigram statistics (the paper's), loss and entropies",
    ),
    "induction": Analysis(Study.induction, "loss on random tokens minus loss on their repetition"),
}


def flatten(result: Any, prefix: str = "") -> Arrays:
    """Nested dataclasses, mappings and arrays as one mapping, names joined by points."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        result = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    if isinstance(result, Mapping):
        arrays: Arrays = {}
        for name, value in result.items():
            arrays.update(flatten(value, f"{prefix}.{name}" if prefix else str(name)))
        return arrays
    value = result.numpy() if isinstance(result, torch.Tensor) else np.asarray(result)
    return {} if value.dtype == object else {prefix: value}


def save_arrays(path: Path, arrays: Arrays) -> None:
    """Write a compressed `.npz`, atomically. Raises `StorageError`."""
    import io

    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_bytes(path, buffer.getvalue())


def load_arrays(path: Path) -> Arrays:
    """Read what `save_arrays` wrote. Raises `DataError` naming a damaged file."""
    import zipfile

    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path} is damaged ({error}); delete it and run the same command again") from error
