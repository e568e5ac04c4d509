"""A run's analyses: what they are computed from, and their results on disk.

A result is computed again only when something it rests on changed: the crosscoder, the tokens, the snapshots, the
version of the analysis, one of the settings that it names, or a result that it uses. What the analyses are stands in
`crosscoder.evolution.analyses`; nothing here knows one.

Letters: B tokens in a batch, D width, F features, K snapshots.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from crosscoder import weights
from crosscoder.activations.loader import ActivationLoader
from crosscoder.activations.snapshots import SnapshotSet
from crosscoder.activations.store import ActivationStore
from crosscoder.activations.tokens import TokenSet
from crosscoder.common.arrays import layout, load_result, record_beside, save_described
from crosscoder.config import StudySettings
from crosscoder.configfile import read_config, write_config
from crosscoder.evolution.partial import Partial
from crosscoder.figures.results import Part
from crosscoder.files import read_json
from crosscoder.model import Crosscoder
from crosscoder.runs import Run

R = TypeVar("R")
SETTINGS_FILE = "settings.yaml"
BATCH_TOKENS = 2048
"""Scaled activations that are read at a time."""


def _no_figures(result: Any, revisions: Sequence[str]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Analysis(Generic[R]):
    """What an analysis is, what it rests on beside crosscoder, tokens and snapshots, and what is made of its result."""

    name: str
    """Of its files, and on the command line."""
    version: int
    """To be raised when the same inputs give another result: results of other versions are computed again."""
    definition: str
    """In one sentence, for the reader of the result."""
    result: type[R]
    """A dataclass of arrays, numbers and text, other dataclasses, and mappings of these by name."""
    compute: Callable[[Study], R]
    settings: tuple[str, ...] = ()
    """The fields of `StudySettings` that it reads."""
    needs: tuple[Analysis[Any], ...] = ()
    """The analyses whose results it reads."""
    summary: Callable[[R, Sequence[str]], dict[str, Any]] = _no_figures
    """From the result and the names of the snapshots: its part of `summary.json`."""
    page: Part[R] | None = None
    """What its result adds to the page."""
    required: bool = False
    """Whether no page is made without it. Of another analysis that was not run, or not since, the page has nothing."""


class Study:
    """The analyses of a run folder. `result(analysis)` computes what is not there yet, and what it needs."""

    def __init__(self, run: Run, settings: StudySettings, device: torch.device | str = "cpu") -> None:
        """`device`: where the crosscoder and its batches lie.

        Raises `DataError` with the remedy if the run lacks a crosscoder or activations.
        """
        self.run = run
        self.settings = settings
        self.device = torch.device(device)
        run.require(run.crosscoder, f"train it first: crosscoder train {run.path} --help")
        run.require(run.activations("train"), f"collect first: crosscoder collect {run.path} --help")

    @classmethod
    def of(cls, run: Run, device: torch.device | str = "cpu") -> Study:
        """The study with the settings that the run was last analysed with. Raises `DataError` if it never was."""
        path = run.evolution / SETTINGS_FILE
        run.require(path, f"run first: crosscoder evolve {run.path}")
        return cls(run, read_config(path, StudySettings, record=True), device)

    def save_settings(self) -> None:
        """Leave the settings beside the results, for those who read them. Raises `StorageError`."""
        write_config(self.run.evolution / SETTINGS_FILE, self.settings)

    # ------------------------------------------------------------------------------------------- inputs

    @cached_property
    def folded(self) -> Crosscoder:
        """The crosscoder for raw activations."""
        return Crosscoder.from_pretrained(self.run.crosscoder, map_location=self.device).eval()

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
        return self.folded.snapshot_scale.cpu()

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

    def scaled(
        self, store: ActivationStore, n_tokens: int, *, shuffle: bool = False, only: int | None = None
    ) -> Iterator[Tensor]:
        """The first `n_tokens` scaled activations of a store (B, K, D), or those of snapshot `only` (B, 1, D)."""
        scale_K = self.folded.snapshot_scale.double().cpu().numpy()
        if only is not None:
            store, scale_K = store.select([store.snapshot_names[only]]), scale_K[only : only + 1]
        seed = self.settings.seed
        loader = ActivationLoader(
            store, BATCH_TOKENS, seed, shuffle=shuffle, scale=scale_K, drop_last=False, device=self.device
        )
        for x_BKD in loader:
            yield x_BKD[:n_tokens]
            n_tokens -= len(x_BKD)
            if n_tokens <= 0:
                return

    # ------------------------------------------------------------------------------------------- results

    def result(self, analysis: Analysis[R]) -> R:
        """The result of an analysis: from disk if it is of this crosscoder and these settings, else computed."""
        finished = self.finished(analysis)
        if finished is not None:
            return finished
        path, record = self.run.evolution / f"{analysis.name}.npz", self.record(analysis)
        save_described(path, analysis.compute(self), record)
        self.partial(analysis).remove()
        return load_result(analysis.result, path)

    def finished(self, analysis: Analysis[R]) -> R | None:
        """The result of an analysis if it is on disk and of this crosscoder and these settings."""
        path = self.run.evolution / f"{analysis.name}.npz"
        current = record_beside(path).get("of") == self.record(analysis)["of"]
        return load_result(analysis.result, path) if current else None

    def partial(self, analysis: Analysis[Any], *order: object) -> Partial:
        """Where an analysis that takes long keeps its state while it runs, to go on from after a kill.

        `order`: on what else than its result does the state rest, such as the order of the data.
        """
        of = " ".join([self.record(analysis)["of"], *map(str, order)])
        return Partial(self.run.evolution / f".{analysis.name}.partial.npz", of)

    def record(self, analysis: Analysis[Any]) -> dict[str, Any]:
        """What `NAME.json` says: version, definition, settings, and a digest (`of`) of everything the result rests
        on. The words of the definition are not among it."""
        settings = {setting: getattr(self.settings, setting) for setting in analysis.settings}
        rests_on = {
            **self._inputs,
            "analysis": [analysis.name, analysis.version, layout(analysis.result)],
            "settings": settings,
            "needs": {needed.name: self.record(needed)["of"] for needed in analysis.needs},
        }
        digest = hashlib.sha256(json.dumps(rests_on, sort_keys=True).encode()).hexdigest()
        return {
            "analysis": analysis.name,
            "version": analysis.version,
            "definition": analysis.definition,
            "settings": settings,
            "of": digest,
        }

    @cached_property
    def _inputs(self) -> dict[str, Any]:
        _, config = weights.read_config(self.run.crosscoder)
        return {
            "crosscoder": config["checksums"],
            "tokens": {split: self._fingerprint(split) for split in ("train", "heldout", "language_model")},
            "snapshots": self.run.snapshots_identity(),
        }

    def _fingerprint(self, split: str) -> str | None:
        path = self.run.tokens(split) / "tokens.json"
        return str(read_json(path)["fingerprint"]) if path.exists() else None
