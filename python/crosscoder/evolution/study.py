"""A run's analyses: what they are computed from, and their results on disk.

A result is computed again only when something it rests on changed: the crosscoder, the tokens, the snapshots, one of
the settings that the analysis names, or a result that it uses. What the analyses are stands in
`crosscoder.evolution.analyses`.

Letters: K snapshots.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from crosscoder import weights
from crosscoder.activations.snapshots import SnapshotSet
from crosscoder.activations.store import ActivationStore
from crosscoder.activations.tokens import TokenSet
from crosscoder.common.arrays import Arrays, flatten, load_arrays, save_arrays
from crosscoder.config import StudySettings
from crosscoder.errors import ConfigError
from crosscoder.evolution.partial import Partial
from crosscoder.files import read_json, write_json
from crosscoder.model import Crosscoder
from crosscoder.runs import Run


class Study:
    """The analyses of a run folder. `result(name)` computes what is not there yet, and what it needs."""

    def __init__(self, run: Run, settings: StudySettings) -> None:
        """Raises `DataError` with the remedy if the run lacks a crosscoder or activations."""
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
        """The crosscoder for scaled activations. A copy of the weights in memory: not for what needs decoders alone."""
        return self.folded.unfold_scales()

    @property
    def decoders(self) -> Tensor:
        """(F, K, D) decoders for raw activations, mapped from the file: what depends on directions within a snapshot
        is the same as for scaled ones. Where snapshots are compared, `decoder_scale` gives all one unit."""
        return self.folded.W_dec.detach()

    @property
    def decoder_scale(self) -> Tensor:
        """(K,) the factor that turns `decoders` into those for scaled activations."""
        return self.folded.snapshot_scale

    @cached_property
    def snapshots(self) -> SnapshotSet:
        return self.run.snapshots()

    @cached_property
    def store(self) -> ActivationStore:
        """The training tokens' activations, without skipped snapshots."""
        return self.run.store("train")

    @cached_property
    def train(self) -> TokenSet:
        """The tokens that the crosscoder was trained on."""
        return TokenSet.load(self.run.tokens("train"))

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
        """The arrays of one analysis, from disk if they are of this crosscoder and these settings.

        Raises `ConfigError` for an unknown name.
        """
        from crosscoder.evolution.analyses import ANALYSES

        if name not in ANALYSES:
            raise ConfigError(f"there is no analysis {name!r}; known are {', '.join(ANALYSES)}")
        finished = self.finished(name)
        if finished is not None:
            return finished
        path, record = self.run.evolution / f"{name}.npz", self.record(name)
        described = path.with_suffix(".json")
        arrays = flatten(ANALYSES[name].compute(self))
        # Without its record first: a kill between the two writes must not leave new arrays under an old description.
        described.unlink(missing_ok=True)
        save_arrays(path, arrays)
        write_json(described, record)
        self.partial(name).remove()
        return load_arrays(path)

    def finished(self, name: str) -> Arrays | None:
        """The arrays of one analysis if they are on disk and of this crosscoder and these settings."""
        path = self.run.evolution / f"{name}.npz"
        described = path.with_suffix(".json")
        current = path.exists() and described.exists() and read_json(described).get("of") == self.record(name)["of"]
        return load_arrays(path) if current else None

    def partial(self, name: str, *order: object) -> Partial:
        """Where an analysis that takes long keeps its state while it runs, to go on from after a kill.

        `order`: on what else than its result does the state rest, such as the order of the data.
        """
        of = " ".join([self.record(name)["of"], *map(str, order)])
        return Partial(self.run.evolution / f".{name}.partial.npz", of)

    def record(self, name: str) -> dict[str, Any]:
        """What `name`.json says: definition, settings, and a digest (`of`) of everything the result rests on."""
        from crosscoder.evolution.analyses import ANALYSES

        analysis = ANALYSES[name]
        settings = {setting: getattr(self.settings, setting) for setting in analysis.settings}
        rests_on = {
            **self._inputs,
            "definition": analysis.definition,
            "settings": settings,
            "needs": {needed: self.record(needed)["of"] for needed in analysis.needs},
        }
        digest = hashlib.sha256(json.dumps(rests_on, sort_keys=True).encode()).hexdigest()
        return {"analysis": name, "definition": analysis.definition, "settings": settings, "of": digest}

    @cached_property
    def _inputs(self) -> dict[str, Any]:
        _, config = weights.read_config(self.run.crosscoder)
        return {
            "crosscoder": config["checksums"],
            "tokens": {split: self._fingerprint(split) for split in ("train", "heldout", "language_model")},
            "snapshots": read_json(self.run.snapshots_file),
        }

    def _fingerprint(self, split: str) -> str | None:
        path = self.run.tokens(split) / "tokens.json"
        return str(read_json(path)["fingerprint"]) if path.exists() else None
